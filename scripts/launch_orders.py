"""What the order of query blocks is worth: launches simulated for plans made on the CPU.

    python scripts/launch_orders.py

Loss is how much longer a launch takes than its work spread evenly over all multiprocessors: with
query blocks begun head after head (those that read everything first), with the longest lists first
(marked where the library does so), dealt by length among programs that stay (the kernel in Gluon;
marked where the library does so), and the first two with text rows in chunks. The time of a program
is fitted to rows of `bench_kernels` on an H200; `scripts/launches/schedule.py` says what is left
out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a bare checkout

from scripts.launches.cases import Case, cases
from scripts.launches.fit import Fit, fit
from scripts.launches.schedule import Cost, Losses, Work

HEADER = """
| plan | programs | evenly | head after head | longest first | dealt | chunks | both |
|---|---|---|---|---|---|---|---|
""".strip()


def line_of(case: Case, cost: Cost) -> str:
    """A row of the table."""
    work = Work.of(case.plan, case.heads, case.head_dim)
    found = Losses.of(work, cost)
    chosen = " *" if work.queued else ""
    by_length = " *" if work.queued and case.plan.lasting else ""
    losses = (found.plain, found.longest, found.dealt, found.chunks, found.both)
    plain, longest, dealt, chunks, both = (f"{100 * loss:.1f} %" for loss in losses)
    return (
        f"| {case.name} | {found.programs:,} | {found.ideal:.3f} ms | {plain} | {longest}{chosen} "
        f"| {dealt}{by_length} | {chunks} | {both} |"
    )


def sentence_of(head_dim: int, found: Fit) -> str:
    return (
        f"Head dim {head_dim}: {found.cost.program:.1f} us a program and {found.cost.entry:.2f} us "
        f"an entry, fitted to {found.rows} rows, all within {100 * found.worst:.0f} %."
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
