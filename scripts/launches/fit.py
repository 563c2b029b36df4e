"""The time of a query block, from what `bench_kernels` measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from dit_sparse.plan import BlockPlan, Blocks
from scripts.launches.schedule import LIBRARY, Cost, Work

Floats: TypeAlias = NDArray[np.float64]
#: Shorter calls are as long as the host takes to launch them.
LEAST_TOKENS = 10_000
#: Microseconds of the pass before that measures the lengths of q and k, for each number of q: 0.06
#: ms for 16,896 tokens and 24 heads of 128 [H200]. As long as the query blocks are of 128, times of
#: calls do not tell it from that of beginning and ending one.
PASS = 0.06e3 / (16_896 * 24 * 128)


@dataclass(frozen=True)
class Fit:
    """Least squares of relative errors.

    Args:
        cost: of query blocks.
        rows: how many measurements.
        worst: the largest relative error of one.
    """

    cost: Cost
    rows: int
    worst: float


def fit(path: Path, head_dim: int) -> Fit:
    """Time = block * blocks + entry * entries of the program that has most, behind the pass over q
    and k.

    Args:
        path: rows of `bench_kernels`, on a GPU of 132 multiprocessors, of which those of lists of
            one length count.
    """
    known, times = [], []
    for row in _rows(path, head_dim):
        work = Work.of(_plan(row), row["heads"])
        longest = work.longest(work.way, LIBRARY)
        known.append([longest.size, longest.sum()])
        times.append(1000 * row["ms"] - PASS * row["tokens"] * row["heads"] * head_dim)
    x, y = np.array(known, dtype=np.float64), np.array(times)
    found = least_squares(x, y)
    worst = float(np.abs(x @ found / y - 1.0).max())
    return Fit(Cost(float(found[0]), float(found[1])), len(y), worst)


def least_squares(known: Floats, times: Floats) -> Floats:
    """What each column of what is known takes, by relative errors of the times."""
    ones = np.ones(len(times))
    found: Floats = np.linalg.lstsq(known / times[:, None], ones, rcond=None)[0]
    return found


def _rows(path: Path, head_dim: int) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        kind = (row["head_dim"], row["variant"], row["grid"])
        if kind == (head_dim, "triton", None) and row["tokens"] >= LEAST_TOKENS:
            yield row


def _plan(row: dict[str, Any]) -> BlockPlan:
    """Lists of one length, wherever they point."""
    blocks = Blocks.uniform(row["tokens"], 128)
    entries = max(1, round(row["density"] * blocks.n))
    count = torch.full((1, 1, blocks.n), entries, dtype=torch.int32)
    zero = torch.zeros_like(count)
    indices = torch.zeros(entries * blocks.n, dtype=torch.int32)
    return BlockPlan(blocks, blocks, indices, zero, count, zero)
