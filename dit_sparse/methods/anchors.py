"""Disjoint windows with the rest of the picture at low resolution (Scale-DiT)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse import orders, per_axis
from dit_sparse.grid import Permutation, TokenGrid
from dit_sparse.method import CallContext, PlanScope
from dit_sparse.neighbourhood import Intervals, Partition, whole
from dit_sparse.per_axis import Extents
from dit_sparse.plan import BlockPlan, Pools
from dit_sparse.tile_lists import Reach, Tiling, Visits, of_place, total
from dit_sparse.window_plan import assemble, tile_grid


@dataclass(frozen=True)
class AnchorMethod:
    """A query reads its own window exactly and the whole picture through anchors.

    Scale-DiT, now UltraImageGen (arXiv 2510.16325): fixed disjoint windows, tokens of the picture
    at low resolution, and text, all in one softmax. Its models carry the low resolution in the
    sequence: a second grid of the layout, read by every query as text is. For any other model
    the anchors are made from the picture itself: outside its window a query reads the mean key and
    value of every cell, weighted by the tokens that it stands for.

    Not followed are the restrictions that Scale-DiT's code puts on the rows of text and of the low
    resolution, which here read everything.

    Args:
        window: tokens of a window per axis, as (frames, height, width), (height, width) for images
            or (width,); more than the axis has mean all of it. The last ones are smaller where
            they do not divide the grid.
        pool: tokens of a cell per axis, powers of two of together at most 128; windows are
            multiples of it, unless they are the axis. Where cells do not divide the grid, those at
            the border are filled up with tokens of the next in the order of the block. `None`
            leaves the anchors to the second grid.
        block: tokens a block holds at most: 64 or 128.

    Raises:
        ValueError: numbers of another type or range; the sentence names the axis.
    """

    window: tuple[int, ...] = (16, 16, 16)
    pool: tuple[int, ...] | None = (1, 4, 4)
    block: int = 128

    name: ClassVar[str] = "anchors"
    scope: ClassVar[PlanScope] = "layout"

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", per_axis.counts(self.window, "window"))
        per_axis.check_block(self.block)
        if self.pool is None:
            return
        pool = per_axis.counts(self.pool, "pool")
        for axis, size in zip(per_axis.AXES[-len(pool) :], pool, strict=True):
            if size & (size - 1):
                raise ValueError(f"Expected a pool along {axis} of a power of two, got {size}.")
        if not 2 <= math.prod(pool) <= self.block:
            raise ValueError(
                f"Expected a pool of 2 to {self.block} tokens, the block, got {math.prod(pool)} "
                f"in {pool}."
            )
        object.__setattr__(self, "pool", pool)

    def dense_reason(self, ctx: CallContext) -> str | None:
        return None

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        """The plan of a layout.

        Raises:
            ValueError: a window that is no multiple of its pool, or numbers for another rank.
        """
        grid = ctx.layout.grid
        window = per_axis.clipped(self.window, "window", grid)
        pool = self._pool_on(grid, window)
        own = tuple(map(Partition, grid.shape, window))
        intervals = tuple(axis.intervals() for axis in own)
        tile = _tile(window, pool, self.block)
        tiling = tile_grid(intervals, tile, self.block, q.device)
        visits = _visits(intervals, tiling, everything=self.pool is not None)
        plan = assemble(ctx.layout, tiling, [visits], self.block)
        if self.pool is None:
            return plan
        pools = Pools((math.prod(self.pool),), plan.partial[..., None])
        order = orders.lift(_cells_together(tiling, grid, pool), ctx.layout)
        return replace(plan, partial=torch.zeros_like(plan.partial), pools=pools, order=order)

    def _pool_on(self, grid: TokenGrid, window: Extents) -> Extents:
        if self.pool is None:
            return (1, 1, 1)
        given = per_axis.clipped(self.pool, "pool", grid)
        for axis, extent, size, cell in zip(per_axis.AXES, grid.shape, window, given, strict=True):
            if size < extent and size % cell:
                raise ValueError(
                    f"Expected a window along {axis} of a multiple of {cell} tokens, the pool, got "
                    f"{size} on the grid {grid}."
                )
        return given


def _tile(window: Extents, pool: Extents, block: int) -> Extents:
    """The largest box of whole cells in a window that fits a block; the most cubic of these."""
    ranges = (
        range(cell, -(-size // cell) * cell + 1, cell)
        for size, cell in zip(window, pool, strict=True)
    )
    fitting = (tile for tile in itertools.product(*ranges) if math.prod(tile) <= block)

    def blocks(tile: tuple[int, ...]) -> tuple[int, int]:
        return math.prod(-(-w // t) for w, t in zip(window, tile, strict=True)), sum(tile)

    frames, rows, columns = min(fitting, key=blocks)
    return frames, rows, columns


def _visits(own: tuple[Intervals, ...], tiling: Tiling, *, everything: bool) -> Visits:
    """Tiles of the own window as full ones, and if asked for all others as those that are not."""
    reaches = []
    for intervals, cut in zip(own, tiling.cuts, strict=True):
        reach = Reach.of(intervals, cut)
        if everything:
            every = Reach.of(whole(len(intervals.low)).intervals(), cut)
            reach = Reach(every.first, every.count, reach.full_first, reach.full_count)
        reaches.append(reach)
    return Visits.of(reaches, tiling.device)


def _cells_together(tiling: Tiling, grid: TokenGrid, pool: Extents) -> Permutation:
    """The order of tiles, in which a tile's tokens go from cell to cell, and raster inside each."""
    cells = [-(-extent // size) for extent, size in zip(grid.shape, pool, strict=True)]
    tiles = [len(cut) - 1 for cut in tiling.cuts]

    def number(along: list[Tensor], counts: list[int]) -> Tensor:
        steps = (counts[1] * counts[2], counts[2], 1)
        return total([t * step for t, step in zip(along, steps, strict=True)], tiling.device)

    tile = number([of_place(cut) for cut in tiling.cuts], tiles)
    cell = number([torch.arange(n) // p for n, p in zip(grid.shape, pool, strict=True)], cells)
    return Permutation((tile * math.prod(cells) + cell).argsort(stable=True))
