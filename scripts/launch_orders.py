"""What it is worth who takes which query blocks: launches simulated for plans made on the CPU.

    python scripts/launch_orders.py

Loss is how much longer a launch of the kernel in Gluon takes than its work spread evenly over all
multiprocessors, on each of which a program takes query blocks: one after the other in turns; dealt
by their place among those around the picture, or among the longest lists, which are first then; and
dealt by length. The library's way is marked; the last column is of that with text rows in chunks.
The time of a query block is fitted to rows of `bench_kernels` on an H200;
`scripts/launches/schedule.py` says what is left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a bare checkout

from scripts.launches.cases import Case, cases
from scripts.launches.fit import Fit, fit
from scripts.launches.schedule import WAYS, Cost, Losses, Work

HEADER = """
| plan | query blocks | evenly | in turns | by place | by length | text in chunks |
|---|---|---|---|---|---|---|
""".strip()


def line_of(case: Case, cost: Cost) -> str:
    """A row of the table."""
    work = Work.of(case.plan, case.heads)
    found = Losses.of(work, cost)
    losses = (f"{100 * found.ways[way]:.1f} %{' *' * (way == work.way)}" for way in WAYS)
    return (
        f"| {case.name} | {found.blocks:,} | {found.ideal:.3f} ms | {' | '.join(losses)} "
        f"| {100 * found.chunks:.1f} % |"
    )


def sentence_of(head_dim: int, found: Fit) -> str:
    return (
        f"Head dim {head_dim}: {found.cost.block:.1f} us a query block and {found.cost.entry:.2f} "
        f"us an entry, fitted to {found.rows} rows, all within {100 * found.worst:.0f} %."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measured", type=Path, default=Path("benchmarks/kernels.jsonl"))
    parser.add_argument("--only", default="", help="cases whose names have this in them")
    arguments = parser.parse_args()
    fits = {head_dim: fit(arguments.measured, head_dim) for head_dim in (64, 128)}
    for head_dim, found in fits.items():
        print(sentence_of(head_dim, found))
    print(HEADER)
    for case in cases():
        if arguments.only in case.name:
            print(line_of(case, fits[case.head_dim].cost), flush=True)


if __name__ == "__main__":
    main()
