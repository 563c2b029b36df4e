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
BEGIN, END = "<!-- kernels: from benchmarks/kernels.jsonl -->", "<!-- kernels: end -->"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def kernel_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of the sparse kernel against the fastest dense one, and its environment."""
    environment = rows[0]["environment"]
    lines = [
        f"One {environment['device']}, torch {environment['torch']}, Triton "
        f"{environment['triton']}, cuDNN {environment['cudnn']}, bf16, batch 1, random inputs, "
        "interleaved medians. Density is measured; the rate counts visited blocks only. The time "
        "is that of one call with the permutation and its undoing; the last speedup adds a plan "
        "made from scratch for every call, where a pipeline makes one per resolution.",
        "",
        "| blocks | tokens x heads x dim | density | dense cuDNN | sparse | of cuDNN's rate | "
        "speedup | with plan |",
        "|---|---|---|---|---|---|---|---|",
    ]
    dense = {_case(row): row for row in rows if row["variant"] == "cudnn"}
    for row in rows:
        if row["variant"] != "triton":
            continue
        grid = f" {row['grid']}" if row["grid"] else ""
        lines.append(
            f"| {row['pattern']}{grid} | {row['tokens']:,} x {row['heads']} x {row['head_dim']} | "
            f"{row['measured_density']:.3f} | {dense[_case(row)]['ms']:.2f} ms | "
            f"{row['ms']:.2f} ms | "
            f"{row['of_cudnn']:.2f} | {row['speedup']:.2f}x | {row['speedup_with_plan']:.2f}x |"
        )
    return "\n".join(lines)


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("pattern", "tokens", "heads", "head_dim", "density", "grid"))


def with_table(text: str, table: str) -> str:
    """README text with the table between its markers.

    Raises:
        ValueError: the markers are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"Expected {BEGIN} and {END} in README.md, got a text without them.")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    table = kernel_table(rows_of(ROOT / "benchmarks" / "kernels.jsonl"))
    wanted = with_table(text, table)
    if arguments.check:
        sys.exit(0 if text == wanted else "README.md differs from benchmarks/kernels.jsonl.")
    readme.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
