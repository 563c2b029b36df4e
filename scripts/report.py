"""Writes the tables of README.md from the JSON lines in benchmarks/.

python scripts/report.py          # rewrites README.md between its markers
python scripts/report.py --check  # exit code 1 if README.md does not say what was measured
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def environment_of(rows: list[dict[str, Any]]) -> str:
    environment = rows[0]["environment"]
    names = [f"{n} {environment.get(n)}" for n in ("torch", "triton", "diffusers", "cudnn")]
    return f"One {environment['device']}, {', '.join(n for n in names if 'None' not in n)}, bf16"


def kernel_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of the sparse kernel against the fastest dense one, and its environment."""
    lines = [
        f"{environment_of(rows)}, batch 1, random inputs, interleaved medians. Density is "
        "measured; the rate counts visited blocks only. The time is that of one call with the "
        "permutation and its undoing; the last speedup adds a plan made from scratch for every "
        "call, where a pipeline makes one per resolution.",
        "",
        "| blocks | tokens x heads x dim | density | dense cuDNN | flex | sparse | of cuDNN's rate "
        "| speedup | with plan |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    variants = {(_case(row), row["variant"]): row for row in rows}
    for row in rows:
        if row["variant"] != "triton":
            continue
        flex = variants.get((_case(row), "flex"))
        grid = f" {row['grid']}" if row["grid"] else ""
        if row.get("stride"):
            grid += f", {row['window'].removeprefix('WindowShape')[1:-1]}"
        flex_ms = f"{flex['ms']:.2f} ms" if flex else ""
        lines.append(
            f"| {row['pattern']}{grid} | {row['tokens']:,} x {row['heads']} x {row['head_dim']} | "
            f"{row['measured_density']:.3f} | {variants[_case(row), 'cudnn']['ms']:.2f} ms | "
            f"{flex_ms} | {row['ms']:.2f} ms | {row['of_cudnn']:.2f} | {row['speedup']:.2f}x | "
            f"{row['speedup_with_plan']:.2f}x |"
        )
    return "\n".join(lines)


def steps_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of whole denoising steps, dense and with every method."""
    lines = [
        f"{environment_of(rows)}, random weights of the full size, one forward without guidance, "
        "variants in turn, medians. The baseline is the fastest dense one of the run; *ideal* is a "
        "sparse kernel with the rate of dense cuDNN and free planning at the measured density.",
        "",
        "| model, tokens | mode | dense | attention | method | density | sparse | speedup | ideal "
        "| of ideal |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    by_mode: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for row in rows:
        by_mode.setdefault((row["model"], row["compiled"]), []).append(row)
    for (model, compiled), group in by_mode.items():
        dense = min(r["ms"] for r in group if r["variant"] in ("stock", "dense") and "ms" in r)
        lines += [
            f"| {model}, {row['tokens']:,} | {'compiled' if compiled else 'eager'} | "
            f"{dense:.0f} ms | {row['attention_share']:.0%} | {row['variant'].split()[0]} | "
            f"{row['measured_density']:.3f} | {row['ms']:.0f} ms | {row['speedup']:.2f}x | "
            f"{row['ideal']:.2f}x | {row['speedup'] / row['ideal']:.2f} |"
            for row in group
            if row["variant"] not in ("stock", "dense") and "ms" in row
        ]
    return "\n".join(lines)


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(
        row[key] for key in ("pattern", "tokens", "heads", "head_dim", "density", "grid", "window")
    )


def overhead_table(rows: list[dict[str, Any]]) -> str:
    """What the processor adds to a call on the host."""
    lines = [
        f"{environment_of(rows)}, eager, a Wan transformer so small that the device waits for the "
        "host: median host time per layer. In long sequences the device's work hides it.",
        "",
        "| attention | host time per layer | added |",
        "|---|---|---|",
    ]
    lines += [
        f"| {row['variant']} | {row['host_us']:.0f} µs | {row['added_us']:+.0f} µs |"
        for row in rows
    ]
    return "\n".join(lines)


def quality_table(rows: list[dict[str, Any]]) -> str:
    """Quality against speed of an evaluation, from the `summary.jsonl` that it wrote."""
    first = rows[0]
    arguments = ", ".join(f"{name} {value}" for name, value in first["arguments"].items())
    lines = [
        f"{first['model']}, {arguments}; {len(first['prompts'])} prompts x {len(first['seeds'])} "
        f"seeds; {environment_of(rows).removesuffix(', bf16')}, {first['dtype']}, "
        f"{'compiled' if first['compiled'] else 'eager'}. Speedups are of denoising over the "
        "fastest dense attention; PSNR and SSIM against the stock pipeline from the same noise, "
        "means over clips, the worst in brackets.",
        "",
        "| method | density | speedup | ideal | end to end | PSNR dB | SSIM |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if not row["clips"] or row["speedup"] is None:
            continue
        ideal = "" if row["model_of_speed"] is None else f"{row['model_of_speed']['ideal']:.2f}x"
        lines.append(
            f"| {row['label']} | {row['density']:.3f} | {row['speedup']:.2f}x | {ideal} | "
            f"{row['speedup_total']:.2f}x | {_mean_and_worst(row, 'psnr', '.1f')} | "
            f"{_mean_and_worst(row, 'ssim', '.3f')} |"
        )
    return "\n".join(lines)


def _mean_and_worst(row: dict[str, Any], name: str, form: str) -> str:
    value = row["quality"].get(name)
    if value is None:
        return "identical" if row["identical"] and name == "psnr" else ""
    return f"{value:{form}} ({row['worst'][name]:{form}})"


#: Made once there is something to make them of.
LATER = {"quality"}
TABLES = {
    "kernels": kernel_table,
    "steps": steps_table,
    "overhead": overhead_table,
    "quality": quality_table,
}


def with_tables(text: str) -> str:
    """README text with every table between its markers.

    Raises:
        ValueError: markers are not there.
    """
    for name, table in TABLES.items():
        if name in LATER and not (BENCHMARKS / f"{name}.jsonl").exists():
            continue
        begin, end = f"<!-- {name}: from benchmarks/{name}.jsonl -->", f"<!-- {name}: end -->"
        if begin not in text or end not in text:
            raise ValueError(f"Expected {begin} and {end} in README.md, got a text without them.")
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        rows = rows_of(BENCHMARKS / f"{name}.jsonl")
        text = f"{before}{begin}\n{table(rows)}\n{end}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    wanted = with_tables(text)
    if arguments.check:
        sys.exit(0 if text == wanted else "README.md differs from benchmarks/*.jsonl.")
    readme.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
