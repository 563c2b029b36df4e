"""Which tiles to cut a grid into for a window, and which window meets a density: by counting.

A window is a box, so the tiles that a tile of queries visits are a product over the axes, and all
tile shapes can be tried exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from dit_sparse.grid import TokenGrid

Extents: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True)
class WindowShape:
    """A window on one grid, in tokens along (frames, height, width)."""

    window: Extents
    stride: Extents
    tile: Extents


@cache
def best_tile(grid: TokenGrid, window: Extents, stride: Extents, block: int) -> Extents:
    """The tile of at most `block` tokens for which the visited blocks take the least time."""
    visits = [
        {t: _visits(extent, w, s, t) for t in range(1, min(extent, block) + 1)}
        for extent, w, s in zip(grid.shape, window, stride, strict=True)
    ]

    def cost(tile: Extents) -> tuple[float, int]:
        axes = [v[t] for v, t in zip(visits, tile, strict=True)]
        return _time(grid, tile, axes, block), sum(tile)

    return min(_shapes(grid, block), key=cost)


@cache
def window_for_density(
    grid: TokenGrid, density: float, block: int, tile: Extents | None = None
) -> WindowShape:
    """Tile and window whose visited share of blocks is nearest to a density, strided by the tile.

    Windows that are odd multiples of a tile, strided by it, are made of whole tiles: little of a
    visited block is masked. Shapes within 10 % of the density compete on time per visited token
    pair and, where that is about equal, on how even the window is; the others on how near they
    come.
    """
    share = density ** (1 / (sum(extent > 1 for extent in grid.shape) or 1))

    @cache
    def axis(extent: int, t: int) -> list[tuple[int, _Visits]]:
        """The windows next to the even share of an axis."""
        below = 2 * int((share * extent / t - 1) // 2) + 1
        windows = {min(t * max(1, n), extent) for n in (below, below + 2)}
        if share == 1.0:
            windows = {extent}
        return [(w, _visits(extent, w, min(t, w), t)) for w in sorted(windows)]

    def cost(shape: Extents, axes: Sequence[_Visits]) -> tuple[float, float, float, int]:
        shares = [a.visited / a.tiles**2 for a in axes]
        miss = max(abs(math.log(math.prod(shares) / density)), math.log(1.1))
        time = _time(grid, shape, axes, block) * (block / grid.length) ** 2 / math.prod(shares)
        uneven = [
            abs(math.log(s / share)) for s, n in zip(shares, grid.shape, strict=True) if n > 1
        ]
        return miss, round(time, 1), max(uneven, default=0.0), sum(shape)

    choices = (
        (*cost(shape, [v for _, v in axes]), tuple(w for w, _ in axes), shape)
        for shape in ([tile] if tile else _shapes(grid, block))
        for axes in itertools.product(*map(axis, grid.shape, shape))
    )
    *_, window, best = min(choices)
    a, b, c = window
    return WindowShape((a, b, c), (min(best[0], a), min(best[1], b), min(best[2], c)), best)


class _Visits(NamedTuple):
    """Along one axis: tiles, pairs of tiles with a visible key, and pairs with all visible."""

    tiles: int
    visited: int
    full: int


def _visits(extent: int, window: int, stride: int, tile: int) -> _Visits:
    low, high = (t.tolist() for t in span(extent, window, stride))
    tiles = math.ceil(extent / tile)
    visited = full = 0
    for first in range(0, extent, tile):
        last = min(first + tile, extent) - 1
        visited += high[last] // tile - low[first] // tile + 1
        stop = tiles if high[first] == extent - 1 else (high[first] + 1) // tile
        full += max(0, stop - math.ceil(low[last] / tile))
    return _Visits(tiles, visited, full)


# Time of a short block and of a masked one, relative to a whole one (H200, head dim 128). Masked
# blocks gather in the few rows of tiles at the border, whose programs run on when all others have
# ended: their arithmetic alone would be 2.4.
_SHORT, _MASKED = 1.2, 10.0


def _time(grid: TokenGrid, tile: Extents, axes: Sequence[_Visits], block: int) -> float:
    """Estimated time of all visited blocks, in whole blocks; the counts are products of axes."""
    whole = math.prod(tile) == block and not any(
        extent % t for extent, t in zip(grid.shape, tile, strict=True)
    )
    visited, full = math.prod(a.visited for a in axes), math.prod(a.full for a in axes)
    return full * (1.0 if whole else _SHORT) + (visited - full) * _MASKED


def _shapes(grid: TokenGrid, block: int) -> list[Extents]:
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
    position = torch.arange(extent)
    leader = (position // stride * stride + stride // 2).clamp(max=extent - 1)
    low = (leader - window // 2).clamp(0, extent - window)
    return low, low + window - 1
