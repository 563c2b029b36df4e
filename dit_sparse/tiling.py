"""Which tiles to cut a grid into for a window, and which window meets a density: by counting.

A window is a box, so the tiles that a tile of queries visits are a product over the axes, and all
tile shapes can be tried exactly.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.block_times import ROW, WHOLE, Work
from dit_sparse.grid import TokenGrid
from dit_sparse.neighbourhood import Axis, Intervals, Neighbourhood
from dit_sparse.per_axis import Extents
from dit_sparse.tile_lists import Reach, classes, cuts


@dataclass(frozen=True)
class WindowShape:
    """A window on one grid, in tokens along (frames, height, width)."""

    window: Extents
    stride: Extents
    tile: Extents


@cache
def best_tile_for(heads: tuple[tuple[Axis, ...], ...], block: int) -> Extents:
    """The tile of at most `block` tokens for which the visited blocks take the least time.

    Args:
        heads: the windows along the three axes, one triple for each head or each kind of heads.
        block: tokens.
    """
    grid = TokenGrid(*(axis.extent for axis in heads[0]))
    kinds = [
        [{t: _visits(axis, t) for t in range(1, min(axis.extent, block) + 1)} for axis in axes]
        for axes in dict.fromkeys(heads)
    ]

    def cost(tile: Extents) -> tuple[float, int]:
        time = sum(
            _time(tile, [visits[t] for visits, t in zip(kind, tile, strict=True)], block)
            for kind in kinds
        )
        return time, sum(tile)

    return min(shapes(grid, block), key=cost)


@cache
def window_for_density(
    grid: TokenGrid, density: float, block: int, tile: Extents | None = None
) -> WindowShape:
    """Tile, window and stride whose visited share of blocks is nearest to a density.

    Along every axis a window is the whole axis or some tiles, at least three: an odd number strided
    by one tile, or an even number strided by two, which both begin where a tile does, so that
    little of a visited block is masked. It reads the tiles on both sides, so that no part of the
    grid is cut off from the rest. Shapes within 10 % of the density compete on time per visible
    token pair against evenness, the same share of every axis.

    Where three tiles per axis already exceed the density (small grids, densities below a few per
    cent), the result is the nearest that there is; the density of the plan tells.
    """
    search = _Search(grid, density, block)
    # Short blocks cost as much as whole ones: many below a quarter cost more than they save.
    least = min(block // 4, math.ceil(grid.length / 64))
    tried = [tile] if tile else [s for s in shapes(grid, block) if math.prod(s) >= least]
    best = _Found(math.inf, math.inf, 0, grid.shape, grid.shape, grid.shape)
    for blocks, shape in sorted((_blocks(grid, shape), shape) for shape in tried):
        if best.miss <= _NEAR and best.cost <= search.least(blocks):
            break  # all visited blocks could be whole, and those to come would still cost more
        best = min(best, *search.found(shape))
    return WindowShape(best.window, best.stride, best.tile)


class _Found(NamedTuple):
    """A tile with a window; the least is the best."""

    miss: float
    cost: float
    size: int
    window: Extents
    stride: Extents
    tile: Extents


@dataclass(frozen=True)
class _Search:
    grid: TokenGrid
    density: float
    block: int

    def least(self, blocks: int) -> float:
        """What any window near the density costs at least with this many blocks, or more."""
        entries = self.density * math.exp(_NEAR)  # for each pair of blocks, at most
        return math.log(blocks**2 * WHOLE + blocks * ROW / entries)

    def found(self, tile: Extents) -> Iterator[_Found]:
        """For any two axes of windows, those of the third that come next to the density."""
        *outer, inner = (
            _choices(extent, t, self.density == 1.0)
            for extent, t in zip(self.grid.shape, tile, strict=True)
        )
        for a, b in itertools.product(*outer):
            wanted = self.density / (a.share * b.share)
            at = bisect(inner, wanted, key=lambda choice: choice.share)
            for c in inner[max(0, at - 1) : at + 1]:
                yield self._rated(tile, a, b, c)

    def _rated(self, tile: Extents, *axes: _Choice) -> _Found:
        a, b, c = axes
        got = a.share * b.share * c.share
        shares = [x.share for x, n in zip(axes, self.grid.shape, strict=True) if n > 1]
        even = self.density ** (1 / (len(shares) or 1))
        uneven = max((abs(math.log(share / even)) for share in shares), default=0.0)
        time = _time(tile, [x.visits for x in axes], self.block)
        time /= a.visible * b.visible * c.visible
        return _Found(
            miss=max(abs(math.log(got / self.density)), _NEAR),
            cost=math.log(time) + _EVEN * uneven,
            size=sum(tile),
            window=(a.window, b.window, c.window),
            stride=(a.stride, b.stride, c.stride),
            tile=tile,
        )


class _Visits(NamedTuple):
    """Along one axis: tiles, pairs of tiles with a visible key, pairs with all visible, tiles with
    no other pairs, whether all tiles are of one size, and the most windows in a tile."""

    tiles: int
    visited: int
    full: int
    clean: int
    even: bool
    classes: int


class _Choice(NamedTuple):
    """A window and a stride along one axis, and its shares of visited and visible pairs."""

    window: int
    stride: int
    share: float
    visible: float
    visits: _Visits

    @staticmethod
    def of(extent: int, window: int, stride: int, tile: int) -> _Choice:
        axis = Neighbourhood(extent, window, stride)
        visits = _visits(axis, tile)
        low, high = _intervals(axis).low, _intervals(axis).high
        visible = int((high - low + 1).sum()) / extent**2
        return _Choice(window, stride, visits.visited / visits.tiles**2, visible, visits)


@cache
def _choices(extent: int, tile: int, everything: bool) -> list[_Choice]:
    """The windows of three or more whole tiles, narrow first; all of the axis."""
    whole = [_Choice.of(extent, extent, min(tile, extent), tile)]
    if everything:
        return whole
    odd = [_Choice.of(extent, w, tile, tile) for w in range(3 * tile, extent, 2 * tile)]
    even = [_Choice.of(extent, w, 2 * tile, tile) for w in range(4 * tile, extent, 2 * tile)]
    return sorted((*odd, *even, *whole), key=lambda choice: (choice.share, choice.window))


@cache
def _visits(axis: Axis, tile: int) -> _Visits:
    intervals = _intervals(axis)
    along = cuts(intervals.runs, tile, tile)
    cut = torch.tensor(along)
    reach = Reach.of(intervals, cut)
    tiles = len(along) - 1
    even = tiles * tile == axis.extent
    visited, full = int(reach.count.sum()), int(reach.full_count.sum())
    clean = int((reach.count == reach.full_count).sum())
    return _Visits(tiles, visited, full, clean, even, classes(intervals, cut))


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is remembered must serve training too
def _intervals(axis: Axis) -> Intervals:
    return axis.intervals()


# What evenness may cost: a window whose share of an axis is twice as far off as another's must
# take 0.76 of its time. More of it buys evenness with masked blocks, less of it gives bands.
_EVEN = 0.4
_NEAR = math.log(1.1)


def _time(tile: Extents, axes: Sequence[_Visits], block: int) -> float:
    """Estimated time of all visited blocks; the counts are products of axes."""
    visited, full = math.prod(a.visited for a in axes), math.prod(a.full for a in axes)
    rows = math.prod(a.tiles for a in axes)
    work = Work(
        rows=rows,
        full=full,
        partial=visited - full,
        masked_rows=rows - math.prod(a.clean for a in axes),
        whole=math.prod(tile) == block and all(axis.even for axis in axes),
        classes=sum(axis.classes for axis in axes),
    )
    return work.time


def _blocks(grid: TokenGrid, tile: Extents) -> int:
    return math.prod(math.ceil(extent / t) for extent, t in zip(grid.shape, tile, strict=True))


def shapes(grid: TokenGrid, block: int) -> list[Extents]:
    """Every tile on this grid of at most `block` tokens.

    Among equals the most cubic is chosen: its neighbours are nearest, which the L2 cache likes.
    """
    frames, height, width = (min(extent, block) for extent in grid.shape)
    return [
        (f, h, w)
        for f in range(1, frames + 1)
        for h in range(1, min(height, block // f) + 1)
        for w in range(1, min(width, block // (f * h)) + 1)
    ]


def span(extent: int, window: int, stride: int) -> tuple[Tensor, Tensor]:
    """First and last visible key of every position of one axis, int64 `[extent]` each."""
    intervals = Neighbourhood(extent, window, stride).intervals()
    return intervals.low, intervals.high
