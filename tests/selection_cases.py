"""Selection as the specification words it, in loops and in float64, for comparison."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from dit_sparse.frame import Frame, frame_of
from dit_sparse.grid import TextSpan, TokenGrid, TokenLayout
from dit_sparse.plan import Blocks

LAYOUTS = {
    "image": TokenLayout.of(TokenGrid(1, 16, 16)),
    "ragged": TokenLayout.of(TokenGrid(1, 17, 15)),
    "text": TokenLayout.of(TokenGrid(3, 7, 11), 13, 40),
    "padding": TokenLayout((TokenGrid(3, 7, 11), TextSpan(90, (90, 3)))),
    "reference": TokenLayout((TextSpan(6), TokenGrid(1, 12, 12), TokenGrid(1, 5, 5))),
    "one token": TokenLayout.of(TokenGrid(1, 1, 1)),
}


def frame(layout: str, block: int = 64, order: str = "hilbert") -> Frame:
    return frame_of(LAYOUTS[layout], block, order)


def qkv(layout: str, heads: int = 3, dim: int = 16, batch: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, heads, LAYOUTS[layout].length, dim)
    return tuple(torch.randn(shape, generator=generator) for _ in range(3))


def ordered(x: Tensor, frame: Frame) -> Tensor:
    return x if frame.order is None else x[:, :, frame.order.index]


def ranges(blocks: Blocks) -> list[range]:
    return [range(a, b) for a, b in itertools.pairwise(blocks.starts.tolist())]


def levels_by_loop(
    scores: list[float], ends: dict[int, float], mass: bool, multiples: dict[int, int]
) -> list[int]:
    """Section 2.6 of the specification for one row, line by line."""
    n = len(scores)
    ranking = sorted(range(n), key=lambda j: -scores[j])
    total = sum(scores)
    cumulated = list(itertools.accumulate(scores[j] for j in ranking))
    level, previous = [0] * n, 0
    for factor, end in ends.items():
        if mass:
            count = sum(c / total <= end + 1e-6 for c in cumulated)
            raw = count + 1 if count > 0 else previous
        else:
            raw = min(n, math.floor(end * n + 1e-9))
        a = multiples.get(factor, 1)
        if a > 1 and raw > previous:
            stop = min(previous + math.ceil((raw - previous) / a) * a, n)
            if stop == n:
                stop = previous + (stop - previous) // a * a
        else:
            stop = max(previous, min(n, raw))
        if mass and factor == 1:
            stop = max(stop, min(n, math.floor(0.06 * n) + 1))
        for j in ranking[previous:stop]:
            level[j] = factor
        previous = stop
    return level
