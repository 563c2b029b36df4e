"""Writes the tables of README.md and docs/ from the JSON lines in benchmarks/ and docs/quality/.

python scripts/report.py          # rewrites them between their markers
python scripts/report.py --check  # exit code 1 if they do not say what was measured

A folder of docs/quality/ is an evaluation that was kept: `report.html`, `report.md` and
`summary.jsonl` of `dit-sparse evaluate`.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a bare checkout

from scripts.report_lines import environment_of, rows_of
from scripts.report_steps import steps_summary, steps_table

ROOT = Path(__file__).resolve().parents[1]


def kernel_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of the sparse kernel against the fastest dense one, and its environment."""
    lines = [
        f"{environment_of(rows)}, batch 1, random inputs, interleaved medians. Density is "
        "measured; the rate counts visited blocks only. The time is that of one call with the "
        "permutation and its undoing; *in order* is without them, as in pipelines whose layers "
        "share an order. The last speedup adds a plan made from scratch for every call, where a "
        "pipeline makes one per resolution.",
        "",
        "| blocks | tokens x heads x dim | density | dense cuDNN | flex | sparse | of cuDNN's rate "
        "| speedup | in order | with plan |",
        "|---|---|---|---|---|---|---|---|---|---|",
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
        ordered = variants.get((_case(row), "ordered"))
        in_order = f"{ordered['speedup']:.2f}x" if ordered else ""
        lines.append(
            f"| {row['pattern']}{grid} | {row['tokens']:,} x {row['heads']} x {row['head_dim']} | "
            f"{row['measured_density']:.3f} | {variants[_case(row), 'cudnn']['ms']:.2f} ms | "
            f"{flex_ms} | {row['ms']:.2f} ms | {row['of_cudnn']:.2f} | {row['speedup']:.2f}x | "
            f"{in_order} | {row['speedup_with_plan']:.2f}x |"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Published:
    """Milliseconds on an H100 that others report, 24 heads of 128.

    Args:
        source: of the figures.
        grid, stride: of the case, whose windows are those of `bench_kernels.EXPLICIT`.
        dense: theirs.
        whole: with the permutation in every call; `None` where the source has no such figure.
        alone: of the kernel, on tokens in its order.
    """

    source: str
    grid: str
    stride: tuple[int, ...]
    dense: float
    whole: float | None
    alone: float


_NATTEN = "NATTEN 0.21, [its documentation](https://natten.org)"
_STA = "STA, [2502.04507](https://arxiv.org/abs/2502.04507)"
PUBLISHED = (
    Published(_NATTEN, "1x256x256", (16, 16), 97.4, 10.6, 7.91),
    Published(_NATTEN, "1x256x256", (1, 1), 97.4, 18.6, 16.2),
    Published(_NATTEN, "30x48x80", (16, 8, 8), 283.3, 29.1, 23.4),
    Published(_NATTEN, "30x48x80", (1, 1, 1), 283.3, 84.4, 79.0),
    Published(_STA, "30x48x80", (16, 8, 8), 265.3, None, 25.4),
)


def published_table(rows: list[dict[str, Any]]) -> str:
    """Windows on an H100 beside what others publish for theirs, no text."""
    lines = [
        f"{environment_of(rows)}, 24 heads of 128, no text; speedups over the dense attention of "
        "the same process, here and there. *Whole* is with the permutation in every call, *in "
        "order* without it. Theirs were not measured again here.",
        "",
        "| grid, window, stride | dense | whole | in order | published | dense | whole "
        "| in order |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for other in PUBLISHED:
        case = {
            row["variant"]: row
            for row in rows
            if (row["grid"], row["stride"], row["text"]) == (other.grid, list(other.stride), 0)
        }
        window = case["triton"]["window"].partition("window=(")[2].partition(")")[0]
        dense = case["cudnn"]["ms"]
        ours = [_over(dense, case[variant]["ms"]) for variant in ("triton", "ordered")]
        theirs = [_over(other.dense, time) for time in (other.whole, other.alone)]
        lines.append(
            f"| {other.grid}, ({window}), ({', '.join(map(str, other.stride))}) | {dense:.1f} ms | "
            f"{' | '.join(ours)} | {other.source} | {other.dense} ms | {' | '.join(theirs)} |"
        )
    return "\n".join(lines)


def _over(dense: float, time: float | None) -> str:
    return "" if time is None else f"{time:.1f} ms, {dense / time:.2f}x"


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(
        row[key] for key in ("pattern", "tokens", "heads", "head_dim", "density", "grid", "window")
    )


def overhead_table(rows: list[dict[str, Any]]) -> str:
    """What the processor adds to a call on the host."""
    lines = [
        f"{environment_of(rows)}, eager, a Wan transformer so small that the device waits for the "
        "host: median host time per layer. In long sequences the device's work hides it. *Alone* "
        "are calls on 4,608 tokens, 24 heads of 128, with the plan at hand.",
        "",
        "| attention | host time per layer | added |",
        "|---|---|---|",
    ]
    lines += [
        f"| {row['variant']} | {row['host_us']:.0f} µs | "
        f"{format(row['added_us'], '+.0f') + ' µs' if 'added_us' in row else ''} |"
        for row in rows
    ]
    return "\n".join(lines)


#: Labels of the dense variants of an evaluation.
DENSE = ("stock", "dense", "cudnn", "flash")


def front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Methods that no other beats in both speed and PSNR, the fastest first."""
    found: list[dict[str, Any]] = []
    sparse = [row for row in rows if row["label"] not in DENSE and row["failed"] is None]
    for row in sorted(
        (row for row in sparse if row["speedup"] and _psnr(row)),
        key=lambda row: (-row["speedup"], -_psnr(row)),
    ):
        if not found or _psnr(row) > _psnr(found[-1]):
            found.append(row)
    return found


def _psnr(row: dict[str, Any]) -> float:
    same = math.inf if row["identical"] else 0.0
    mean = row["quality"].get("psnr")
    return same if mean is None else mean


def quality_table(rows: list[dict[str, Any]]) -> str:
    """Quality against speed of an evaluation, from the `summary.jsonl` that it wrote: its front."""
    first = rows[0]
    count = sum(row["label"] not in DENSE for row in rows)
    arguments = ", ".join(f"{name} {value}" for name, value in first["arguments"].items())
    lines = [
        f"{first['model']}, {arguments}; {len(first['prompts'])} prompts x {len(first['seeds'])} "
        f"seeds; {environment_of(rows).removesuffix(', bf16')}, {first['dtype']}, "
        f"{'compiled' if first['compiled'] else 'eager'}. Speedups are of denoising over the "
        "fastest dense attention; PSNR and SSIM against the stock pipeline from the same noise, "
        f"means over clips, the worst in brackets. Of {count} methods, those that no other beats "
        "in both speedup and PSNR.",
        "",
        "| method | density | speedup | ideal | end to end | PSNR dB | SSIM |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in front(rows):
        ideal = "" if row["model_of_speed"] is None else f"{row['model_of_speed']['ideal']:.2f}x"
        lines.append(
            f"| {row['label']} | {row['density']:.3f} | {row['speedup']:.2f}x | {ideal} | "
            f"{row['speedup_total']:.2f}x | {_mean_and_worst(row, 'psnr', '.1f')} | "
            f"{_mean_and_worst(row, 'ssim', '.3f')} |"
        )
    return "\n".join(lines)


def methods_table(rows: list[dict[str, Any]]) -> str:
    """Methods that choose blocks in every call, and static masks, against dense attention."""
    lines = [
        f"{environment_of(rows)}, batch 1, random inputs, interleaved medians against dense cuDNN. "
        "*Whole* is choosing blocks, summaries, the permutation and attention; *in order* is the "
        "same on tokens that are in the method's order already. Static masks choose nothing.",
        "",
        "| method | tokens x heads x dim | density | dense | choosing | whole | speedup "
        "| in order |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        options = ", ".join(f"{name}={value}" for name, value in row["options"].items())
        size = f"{row['tokens']:,} x {row['heads']} x {row['head_dim']}"
        start = f"| {row['method']}, {options}{{}} | {size} | {row['density']:.3f} | "
        start += f"{row['dense_ms']:.2f} ms | "
        if "speedups" in row:
            lines += [
                f"{start.format(', ' + name)} | {row[f'{name}_ms']:.2f} ms | {speedup:.2f}x | |"
                for name, speedup in row["speedups"].items()
            ]
        else:
            lines.append(
                f"{start.format('')}{row['plan_ms']:.2f} ms | {row['whole_ms']:.2f} ms | "
                f"{row['speedup']:.2f}x | {row['speedup_hoisted']:.2f}x |"
            )
    return "\n".join(lines)


def _mean_and_worst(row: dict[str, Any], name: str, form: str) -> str:
    value = row["quality"].get(name)
    if value is None:
        return "identical" if row["identical"] and name == "psnr" else ""
    return f"{value:{form}} ({row['worst'][name]:{form}})"


#: Tables by the file that they stand in and the name of their lines in benchmarks/.
TABLES = {
    "README.md": {"steps": steps_summary},
    "docs/evaluation.md": {"steps": steps_table},
    "docs/piecewise.md": {"methods": methods_table, "h100-methods": methods_table},
    "docs/kernels.md": {
        "kernels": kernel_table,
        "h100-kernels": kernel_table,
        "overhead": overhead_table,
    },
    "docs/windows.md": {"h100-kernels": published_table},
}


def quality_tables(root: Path) -> str:
    """A heading and a table for each evaluation that was kept; nothing if there is none.

    Where no method is faster than dense attention the sentence that says so is all.
    """
    parts = []
    for path in sorted((root / "docs" / "quality").glob("*/summary.jsonl")):
        rows, report = rows_of(path), path.with_name("report.md").relative_to(root)
        parts += [
            f"### Quality: {path.parent.name}",
            f"{rows[0]['recommendation']} [The report]({report.as_posix()}).",
        ]
        if any(row["speedup"] > 1 for row in front(rows)):
            parts.append(quality_table(rows))
    return "\n\n".join(parts)


def with_tables(text: str, root: Path = ROOT, file: str = "README.md") -> str:
    """A file's text with every table between its markers.

    Args:
        text: of the file.
        root: folder with benchmarks/ and docs/.
        file: one of `TABLES`.

    Raises:
        ValueError: markers are not there.
    """
    for name, table in TABLES[file].items():
        source = f"benchmarks/{name}.jsonl"
        text = _between(text, name, source, table(rows_of(root / source)), file)
    if file != "README.md":
        return text
    return _between(text, "quality", "docs/quality/*/summary.jsonl", quality_tables(root), file)


def _between(text: str, name: str, source: str, content: str, file: str) -> str:
    begin, end = f"<!-- {name}: from {source} -->", f"<!-- {name}: end -->"
    if begin not in text or end not in text:
        raise ValueError(f"Expected {begin} and {end} in {file}, got a text without them.")
    before, _, rest = text.partition(begin)
    content = f"{content}\n" if content else ""
    return f"{before}{begin}\n{content}{end}{rest.partition(end)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    arguments = parser.parse_args()
    wrong = []
    for file in TABLES:
        path = ROOT / file
        text = path.read_text(encoding="utf-8")
        wanted = with_tables(text, file=file)
        if text == wanted:
            continue
        wrong.append(file)
        if not arguments.check:
            path.write_text(wanted, encoding="utf-8")
    if arguments.check and wrong:
        sys.exit(f"{', '.join(wrong)}: not what was measured. Run scripts/report.py.")


if __name__ == "__main__":
    main()
