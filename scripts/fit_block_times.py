"""Fits the times of `dit_sparse/block_times.py` to what `bench_kernels` measured on an H200.

    python scripts/fit_block_times.py

Rows are random and clustered lists, and windows whose tokens were in order. What two launches of
masked entries cost is not among them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a bare checkout

from dit_sparse.block_times import Work
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.method import CallContext
from dit_sparse.methods.window import WindowMethod
from scripts.launches.fit import LEAST_TOKENS, PASS, least_squares
from scripts.launches.schedule import MULTIPROCESSORS

NAMES = ("WHOLE", "SHORT", "PRODUCT", "ROW")


@dataclass(frozen=True)
class Measured:
    """A call that was timed.

    Args:
        work: of one of its heads.
        time: of that on one multiprocessor, in microseconds.
    """

    name: str
    work: Work
    time: float

    @property
    def counts(self) -> list[int]:
        """How often each of `NAMES` is in its time."""
        entries = self.work.full + self.work.partial
        whole = self.work.whole
        return [entries * whole, entries * (not whole), self.work.partial, self.work.rows]


def measured(path: Path, head_dim: int) -> Iterator[Measured]:
    """Rows of calls that are longer than their launch."""
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        wanted = "triton" if row["grid"] is None else "ordered"
        kind = (row["variant"], row["head_dim"])
        if kind == (wanted, head_dim) and row["tokens"] >= LEAST_TOKENS:
            work = _listed(row) if row["grid"] is None else _windowed(row)
            time = 1000 * row["ms"] * MULTIPROCESSORS / row["heads"]
            time -= PASS * MULTIPROCESSORS * row["tokens"] * head_dim
            name = row["window"] or f"{row['pattern']} lists, density {row['density']}"
            yield Measured(f"{row['tokens']} tokens, {name}", work, time)


def _listed(row: dict[str, Any]) -> Work:
    rows = -(-row["tokens"] // 128)
    return Work(rows, rows * max(1, round(row["density"] * rows)))


def _windowed(row: dict[str, Any]) -> Work:
    layout = TokenLayout.of(TokenGrid.parse(row["grid"]), text_first=row["text"])
    found = re.findall(r"(window|stride|tile)=\(([^)]*)\)", row["window"])
    shape: dict[str, Any] = {name: tuple(map(int, axes.split(","))) for name, axes in found}
    empty = torch.empty(1, 1, layout.length, 1)
    plan = WindowMethod(**shape).plan(empty, empty, CallContext(layout))
    full, partial = int(plan.full.sum()), int(plan.partial.sum())
    return Work(plan.q_blocks.n, full, partial, whole=not plan.k_blocks.ragged)


def fit(rows: list[Measured]) -> dict[str, float]:
    """Least squares of relative errors; only what occurs."""
    counts = np.array([row.counts for row in rows], dtype=np.float64)
    times = np.array([row.time for row in rows])
    occurs = counts.any(axis=0)
    found = least_squares(counts[:, occurs], times)
    names = [name for name, there in zip(NAMES, occurs, strict=True) if there]
    return dict(zip(names, found.tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measured", type=Path, default=Path("benchmarks/kernels.jsonl"))
    arguments = parser.parse_args()
    for head_dim in (128, 64):
        rows = list(measured(arguments.measured, head_dim))
        found = fit(rows)
        print(f"Head dim {head_dim}:", ", ".join(f"{k} {v:.2f}" for k, v in found.items()))
        for row in rows:
            counts = zip(NAMES, row.counts, strict=True)
            said = sum(found.get(name, 0.0) * count for name, count in counts)
            print(f"  {said / row.time:.3f} of {row.time / 1000:7.2f} ms: {row.name}")


if __name__ == "__main__":
    main()
