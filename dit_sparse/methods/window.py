"""Sliding-window attention over the token grid, in tiles.

Generalized neighbourhood attention (arXiv 2504.16922): per axis a window of w tokens, pushed
inwards at the borders so that every query reads exactly w keys, and a stride s that lets groups of
s queries share the window of their middle one. Stride 1 is neighbourhood attention (NATTEN,
arXiv 2204.07143); stride = tile with windows of odd multiples of the tile is sliding tile
attention (arXiv 2502.04507). Text and reference images are read by all queries and read all keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from dit_sparse import orders
from dit_sparse.grid import TextSpan, TokenGrid, TokenLayout
from dit_sparse.method import CallContext, PlanScope
from dit_sparse.plan import BlockPlan, Blocks, BoxPredicate

Extents: TypeAlias = tuple[int, int, int]

_AXES = ("frames", "height", "width")
_DEFAULT_DENSITY = 0.3


@dataclass(frozen=True)
class WindowMethod:
    """A window around every query.

    Args:
        window: tokens (int) or share of the axis (float) per axis, as (frames, height, width),
            or (height, width) for images.
        density: instead of a window: the share of blocks to visit, spread evenly over the axes;
            windows are then odd multiples of the tile. 0.3 if neither is given.
        stride: queries per axis that share one window; one number or one per axis. By default 1
            for a window and the tile for a density.
        tile: tokens per axis of the tiles that blocks are cut from; by default the shape that
            visits the fewest blocks on this grid.
        block: tokens a block holds at most: 64 or 128.
    """

    window: tuple[int | float, ...] | None = None
    density: float | None = None
    stride: int | tuple[int, ...] | None = None
    tile: tuple[int, ...] | None = None
    block: int = 128

    name: ClassVar[str] = "window"
    scope: ClassVar[PlanScope] = "layout"

    def __post_init__(self) -> None:
        if self.window is not None and self.density is not None:
            raise ValueError(
                f"Expected a window or a density, got both ({self.window} and {self.density})."
            )
        if self.density is not None and not 0.0 < self.density <= 1.0:  # NaN fails too
            raise ValueError(f"Expected a density above 0 and at most 1, got {self.density}.")
        if isinstance(self.stride, int) and self.stride < 1:
            raise ValueError(f"Expected a stride of at least 1, got {self.stride}.")
        if self.block not in (64, 128):
            raise ValueError(f"Expected a block of 64 or 128 tokens, got {self.block}.")
        for name in ("window", "tile", "stride"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) not in (2, 3):
                raise ValueError(
                    f"Expected {name} as (frames, height, width) or (height, width), got {value}."
                )

    def dense_reason(self, ctx: CallContext) -> str | None:
        return None

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        layout, grid = ctx.layout, ctx.layout.grid
        shape = self.shape_on(grid)
        spans = [_span(*a) for a in zip(grid.shape, shape.window, shape.stride, strict=True)]
        order = orders.lift(orders.tile(grid, shape.tile), layout)
        blocks = Blocks.of_runs(_runs(layout, orders.tile_runs(grid, shape.tile)), self.block)
        tokens = _Tokens.of(layout, order.index, spans)
        visited, full = _classify(tokens, blocks)
        real = _real_keys(layout, blocks)
        masked = bool((visited & ~full).any())
        plan = BlockPlan.from_mask(
            visited & real,
            blocks,
            blocks,
            full=full & real if masked else None,
            box=_pack(tokens, grid) if masked else None,
            order=order,
        )
        return plan.to(q.device)

    def shape_on(self, grid: TokenGrid) -> WindowShape:
        """Window, stride and tile in tokens on a grid.

        Raises:
            ValueError: a window outside 1 to the extent of its axis, a stride outside 1 to the
                window, or a tile below 1; the sentence names the axis.
        """
        tile = None if self.tile is None else _tokens(self.tile, "tile", grid, grid.shape)
        if self.window is None:
            shape = window_for_density(grid, self.density or _DEFAULT_DENSITY, self.block, tile)
            if self.stride is None:
                return shape
            window = shape.window
        else:
            window = _tokens(self.window, "window", grid, grid.shape)
        stride = self.stride or 1
        if isinstance(stride, int):
            stride = tuple(min(stride, w) for w in window)
        stride = _tokens(stride, "stride", grid, window)
        return WindowShape(window, stride, tile or best_tile(grid, window, stride, self.block))


@dataclass(frozen=True)
class WindowShape:
    """A window on one grid, in tokens along (frames, height, width)."""

    window: Extents
    stride: Extents
    tile: Extents


@cache
def best_tile(grid: TokenGrid, window: Extents, stride: Extents, block: int) -> Extents:
    """The tile of at most `block` tokens for which the fewest (query, key) blocks are visited.

    The count is a product over the axes, so all shapes are tried exactly.
    """
    visits = [
        {t: _visited_tiles(extent, w, s, t) for t in range(1, min(extent, block) + 1)}
        for extent, w, s in zip(grid.shape, window, stride, strict=True)
    ]

    def cost(tile: Extents) -> tuple[int, int]:
        # Among equal counts the most cubic tile: its neighbours are nearest, which L2 likes.
        return math.prod(v[t] for v, t in zip(visits, tile, strict=True)), sum(tile)

    return min(_shapes(grid, block), key=cost)


@cache
def window_for_density(
    grid: TokenGrid, density: float, block: int, tile: Extents | None = None
) -> WindowShape:
    """Tile and window whose visited share of blocks is nearest to a density, strided by the tile.

    Windows that are odd multiples of a tile, strided by it, are made of whole tiles: nothing of a
    visited block is masked. Shapes within 10 % of the density compete on visited blocks, which is
    what time is spent on; the others on how near they come.
    """
    share = density ** (1 / (sum(extent > 1 for extent in grid.shape) or 1))

    @cache
    def axis(extent: int, t: int) -> tuple[int, int, float]:
        window = extent
        if share < 1.0:
            window = min(t * max(1, 2 * round((share * extent / t - 1) / 2) + 1), extent)
        visits = _visited_tiles(extent, window, min(t, window), t)
        return window, visits, visits / math.ceil(extent / t) ** 2

    def cost(shape: Extents) -> tuple[float, int, int]:
        axes = [axis(extent, t) for extent, t in zip(grid.shape, shape, strict=True)]
        miss = abs(math.log(math.prod(a[2] for a in axes) / density))
        return max(miss, math.log(1.1)), math.prod(a[1] for a in axes), sum(shape)

    best = min([tile] if tile else _shapes(grid, block), key=cost)
    a, b, c = (axis(extent, t)[0] for extent, t in zip(grid.shape, best, strict=True))
    stride = (min(best[0], a), min(best[1], b), min(best[2], c))
    return WindowShape((a, b, c), stride, best)


def _shapes(grid: TokenGrid, block: int) -> list[Extents]:
    """Every tile on this grid of at most `block` tokens."""
    frames, height, width = (min(extent, block) for extent in grid.shape)
    return [
        (f, h, w)
        for f in range(1, frames + 1)
        for h in range(1, min(height, block // f) + 1)
        for w in range(1, min(width, block // (f * h)) + 1)
    ]


def _visited_tiles(extent: int, window: int, stride: int, tile: int) -> int:
    low, high = (t.tolist() for t in _span(extent, window, stride))
    total = 0
    for first in range(0, extent, tile):
        last = min(first + tile, extent) - 1
        total += high[last] // tile - low[first] // tile + 1
    return total


def _span(extent: int, window: int, stride: int) -> tuple[Tensor, Tensor]:
    """First and last visible key of every position of one axis, int64 `[extent]` each."""
    position = torch.arange(extent)
    leader = (position // stride * stride + stride // 2).clamp(max=extent - 1)
    low = (leader - window // 2).clamp(0, extent - window)
    return low, low + window - 1


def _tokens(
    values: tuple[int | float, ...], name: str, grid: TokenGrid, limits: Extents
) -> Extents:
    """Tokens per axis from counts and shares; two values mean (height, width) of an image."""
    if len(values) == 2 and grid.frames == 1:
        values = (1, *values)
    if len(values) != 3:
        raise ValueError(
            f"Expected {name} as (frames, height, width) for the grid {grid}, got {values}."
        )
    tokens = []
    for axis, extent, limit, size in zip(_AXES, grid.shape, limits, values, strict=True):
        share = isinstance(size, float)
        if not (0.0 < size <= 1.0 if share else 1 <= size <= limit):
            raise ValueError(
                f"Expected a {name} along {axis} between 1 and {limit} tokens, or a share of the "
                f"axis above 0.0 and at most 1.0, got {size!r} on the grid {grid}."
            )
        tokens.append(max(1, min(limit, round(size * extent))) if share else int(size))
    return tokens[0], tokens[1], tokens[2]


def _runs(layout: TokenLayout, tiles: list[int]) -> list[int]:
    """Token runs that no block may straddle: tiles, text spans, and where padding begins."""
    runs: list[int] = []
    seen = False
    for segment in layout.segments:
        if isinstance(segment, TextSpan):
            cuts = sorted({0, segment.length, *(segment.valid or ())})
            runs += [b - a for a, b in pairwise(cuts)]
        elif seen:
            runs.append(segment.length)
        else:
            runs += tiles
            seen = True
    return runs


@dataclass(frozen=True)
class _Tokens:
    """Coordinates and windows of every token in plan order, int64 `[N, 3]`.

    A context token (text, reference image) has `context` set; its row reads everything and its
    column is read by all, whatever the other fields say.
    """

    at: Tensor
    low: Tensor
    high: Tensor
    context: Tensor  # bool [N]

    @staticmethod
    def of(layout: TokenLayout, index: Tensor, spans: list[tuple[Tensor, Tensor]]) -> _Tokens:
        start, grid = layout.grid_start, layout.grid
        position = index - start
        inside = (position >= 0) & (position < grid.length)
        at = grid.coordinates()[position.clamp(0, grid.length - 1)]
        low = torch.stack([low[at[:, a]] for a, (low, _) in enumerate(spans)], dim=-1)
        high = torch.stack([high[at[:, a]] for a, (_, high) in enumerate(spans)], dim=-1)
        return _Tokens(at, low, high, ~inside)


def _classify(tokens: _Tokens, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """bool `[1, 1, n, n]` twice: blocks with any visible element, blocks with all visible."""
    of = blocks.of_token[:, None].expand(-1, 3)

    def per_block(values: Tensor, reduce: str) -> Tensor:
        empty = values.new_zeros(blocks.n, 3)
        return empty.scatter_reduce(0, of, values, reduce, include_self=False)

    k_min, k_max = per_block(tokens.at, "amin"), per_block(tokens.at, "amax")
    any_low, any_high = per_block(tokens.low, "amin"), per_block(tokens.high, "amax")
    all_low, all_high = per_block(tokens.low, "amax"), per_block(tokens.high, "amin")
    visited = ((k_max >= any_low[:, None]) & (k_min <= any_high[:, None])).all(-1)
    full = ((k_min >= all_low[:, None]) & (k_max <= all_high[:, None])).all(-1)
    context = tokens.context[blocks.starts[:-1].long()]
    always = context[:, None] | context
    return (visited | always)[None, None], (full | always)[None, None]


def _real_keys(layout: TokenLayout, blocks: Blocks) -> Tensor:
    """bool `[1 or B, 1, 1, n]`: key blocks that are not padding."""
    starts = blocks.starts[:-1].long()
    rows = []
    for entry in range(layout.batch or 1):
        real = torch.zeros(blocks.n, dtype=torch.bool)
        for start, stop in layout.valid_ranges(entry) if layout.batch else [(0, layout.length)]:
            real |= (starts >= start) & (starts < stop)
        rows.append(real)
    return torch.stack(rows)[:, None, None]


def _pack(tokens: _Tokens, grid: TokenGrid) -> BoxPredicate:
    """Packs coordinates into fields of one int32 (see `BoxPredicate`)."""
    guard, ones, shift = 0, 0, 0
    packed = {name: torch.zeros_like(tokens.at[:, 0]) for name in ("at", "low", "high")}
    for axis, extent in enumerate(grid.shape):
        bits = (extent - 1).bit_length()
        for name, value in packed.items():
            value += getattr(tokens, name)[:, axis] << shift
        ones |= ((1 << bits) - 1) << shift
        guard |= 1 << (shift + bits)
        shift += bits + 1
    if shift > 31:
        raise ValueError(
            f"Expected a grid whose coordinates fit 31 bits (a guard bit per axis), got {grid}."
        )
    context = tokens.context
    return BoxPredicate(
        lower=torch.where(context, 0, packed["low"]).int()[None],
        upper=torch.where(context, ones, packed["high"]).int()[None],
        above=torch.where(context, ones, packed["at"]).int(),
        below=torch.where(context, 0, packed["at"]).int(),
        guard=guard,
    )
