"""Which windows of whole tiles to try on a grid, and what each costs: measured, or estimated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dit_sparse.attention import attend
from dit_sparse.bench import time_interleaved
from dit_sparse.block_times import Work
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.method import CallContext
from dit_sparse.methods.window import WindowMethod
from dit_sparse.per_axis import Extents
from dit_sparse.plan import BlockPlan
from dit_sparse.tiling import shapes

_NEAR = 1.15  # of the least time: what a more cubic tile may cost


def tile_for(grid: TokenGrid, block: int) -> Extents:
    """The most cubic tile of those in which reading everything takes little longer than in any.

    At most `block` tokens. Few blocks and whole ones make it fast, at any density.
    """

    def time(tile: Extents) -> float:
        blocks = math.prod(-(-n // t) for n, t in zip(grid.shape, tile, strict=True))
        return Work(blocks, blocks**2, whole=blocks * block == grid.length).time

    times = {tile: time(tile) for tile in shapes(grid, block)}
    least = min(times.values())
    near = [tile for tile, needed in times.items() if needed <= _NEAR * least]
    return min(near, key=lambda tile: (sum(tile), times[tile]))


def windows_for(grid: TokenGrid, tile: Extents) -> tuple[Extents, ...]:
    """One tile, three tiles or all along each axis, in all combinations: 27 for a video."""
    along = []
    for extent, edge in zip(grid.shape, tile, strict=True):
        tiles = -(-extent // edge)
        along.append([count for count in (1, 3) if count < tiles] + [tiles])
    return tuple((f, h, w) for f, h, w in itertools.product(*along))


def measured(q: Tensor, k: Tensor, v: Tensor, plans: Sequence[BlockPlan]) -> list[float]:
    """Milliseconds of a call with each plan, medians of interleaved runs.

    Args:
        q, k, v: `[B, H, N, D]` on a GPU.
        plans: on the same; permutation and its undoing count.
    """
    variants = {
        str(number): lambda plan=plan: attend(q, k, v, plan) for number, plan in enumerate(plans)
    }
    times = time_interleaved(variants, q.device, rounds=7, warmup=2)
    return [times[name].median for name in variants]


def estimated(plans: Sequence[BlockPlan]) -> list[float]:
    """Microseconds of one multiprocessor for each plan, from what was measured for blocks."""
    return [_work(plan).time for plan in plans]


def everything(layout: TokenLayout, block: int, device: torch.device) -> BlockPlan:
    """The plan that reads every key, in the tiles that are best for that."""
    nothing = torch.empty(0, device=device)
    return WindowMethod(density=1.0, block=block).plan(nothing, nothing, CallContext(layout))


def _work(plan: BlockPlan) -> Work:
    rows, heads = plan.q_blocks.n, math.prod(plan.offsets.shape[:2])
    return Work(
        rows=rows,
        full=round(int(plan.full.sum()) / heads),
        partial=round(int(plan.partial.sum()) / heads),
        masked_rows=round(int((plan.partial > 0).sum()) / heads),
        whole=bool((plan.k_blocks.lengths == plan.k_blocks.size).all()),
    )
