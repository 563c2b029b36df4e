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
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse import orders
from dit_sparse.grid import TextSpan, TokenGrid, TokenLayout
from dit_sparse.method import CallContext, PlanScope
from dit_sparse.plan import BlockPlan, Blocks, BoxPredicate

_AXES = ("frames", "height", "width")
_DEFAULT_DENSITY = 0.3


@dataclass(frozen=True)
class WindowMethod:
    """A window around every query.

    Args:
        window: tokens (int) or share of the axis (float) per axis, as (frames, height, width),
            or (height, width) for images.
        density: instead of a window: the share of all keys that a query reads, spread evenly over
            the axes; 0.3 if neither is given.
        stride: queries per axis that share one window; one number or one per axis.
        tile: tokens per axis of the tiles that blocks are cut from; by default the shape that
            visits the fewest blocks for this grid and window.
        block: tokens a block holds at most: 64 or 128.
    """

    window: tuple[int | float, ...] | None = None
    density: float | None = None
    stride: int | tuple[int, ...] = 1
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
        if self.block not in (64, 128):
            raise ValueError(f"Expected a block of 64 or 128 tokens, got {self.block}.")
        for name in ("window", "tile"):
            value = getattr(self, name)
            if value is not None and len(value) not in (2, 3):
                raise ValueError(
                    f"Expected {name} as (frames, height, width) or (height, width), got {value}."
                )

    def dense_reason(self, ctx: CallContext) -> str | None:
        return None

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        layout, grid = ctx.layout, ctx.layout.grid
        window, stride = self.window_of(grid), self.stride_of(grid)
        tile = self.tile_of(grid)
        spans = [_span(*args) for args in zip(grid.shape, window, stride, strict=True)]
        order = orders.lift(orders.tile(grid, tile), layout)
        blocks = Blocks.of_runs(_runs(layout, orders.tile_runs(grid, tile)), self.block)
        tokens = _Tokens.of(layout, order.index, spans)
        visited, full = _classify(tokens, blocks)
        plan = BlockPlan.from_mask(
            visited & _real_keys(layout, blocks),
            blocks,
            blocks,
            full=full,
            box=_pack(tokens, grid),
            order=order,
        )
        return plan.to(q.device)

    def window_of(self, grid: TokenGrid) -> tuple[int, int, int]:
        """The window in tokens on this grid.

        Raises:
            ValueError: a window below 1 or above the extent of its axis.
        """
        if self.window is None:
            moving = sum(extent > 1 for extent in grid.shape) or 1
            share = (self.density or _DEFAULT_DENSITY) ** (1 / moving)
            asked: tuple[int | float, ...] = (share,) * 3
        else:
            asked = _three(self.window, "window", grid)
        tokens = []
        for axis, extent, size in zip(_AXES, grid.shape, asked, strict=True):
            count = max(1, math.ceil(size * extent - 1e-9)) if isinstance(size, float) else size
            if not 1 <= count <= extent or not (isinstance(size, int) or 0.0 < size <= 1.0):
                raise ValueError(
                    f"Expected a window along {axis} between 1 and the grid's {extent} tokens (or "
                    f"a share above 0.0 and at most 1.0), got {size!r} for the grid {grid}."
                )
            tokens.append(count)
        return tokens[0], tokens[1], tokens[2]

    def stride_of(self, grid: TokenGrid) -> tuple[int, int, int]:
        """The stride in tokens on this grid.

        Raises:
            ValueError: a stride below 1 or above the window of its axis.
        """
        window = self.window_of(grid)
        if isinstance(self.stride, int):
            if self.stride < 1:
                raise ValueError(f"Expected a stride of at least 1, got {self.stride}.")
            a, b, c = (min(self.stride, w) for w in window)
            return a, b, c
        stride = _three(self.stride, "stride", grid)
        for axis, s, w in zip(_AXES, stride, window, strict=True):
            if not isinstance(s, int) or not 1 <= s <= w:
                raise ValueError(
                    f"Expected a stride along {axis} between 1 and the window of {w}, got {s!r}."
                )
        return int(stride[0]), int(stride[1]), int(stride[2])

    def tile_of(self, grid: TokenGrid) -> tuple[int, int, int]:
        """The tile in tokens on this grid."""
        if self.tile is None:
            return best_tile(grid, self.window_of(grid), self.stride_of(grid), self.block)
        tile = _three(self.tile, "tile", grid)
        if any(not isinstance(t, int) or t < 1 for t in tile):
            raise ValueError(f"Expected tile extents of at least 1, got {self.tile}.")
        return int(tile[0]), int(tile[1]), int(tile[2])


@cache
def best_tile(
    grid: TokenGrid, window: tuple[int, int, int], stride: tuple[int, int, int], block: int
) -> tuple[int, int, int]:
    """The tile of at most `block` tokens for which the fewest (query, key) blocks are visited.

    The count is a product over the axes, so all shapes are tried exactly.
    """
    visits = [
        {t: _visited_tiles(extent, w, s, t) for t in range(1, min(extent, block) + 1)}
        for extent, w, s in zip(grid.shape, window, stride, strict=True)
    ]
    shapes = (
        (f, h, w)
        for f in visits[0]
        for h in visits[1]
        if f * h <= block
        for w in visits[2]
        if f * h * w <= block
    )
    # Among equal counts the most cubic tile: its neighbours are nearest, which L2 likes.
    return min(shapes, key=lambda t: (math.prod(v[x] for v, x in zip(visits, t, strict=True)), sum(t)))


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


def _three(
    values: tuple[int | float, ...], name: str, grid: TokenGrid
) -> tuple[int | float, int | float, int | float]:
    if len(values) == 2 and grid.frames == 1:
        return (1, values[0], values[1])
    if len(values) == 3:
        return (values[0], values[1], values[2])
    raise ValueError(
        f"Expected {name} as (frames, height, width) for the grid {grid}, got {values}."
    )


def _runs(layout: TokenLayout, tiles: list[int]) -> list[int]:
    """Token runs that no block may straddle: tiles, text spans, and where padding begins."""
    runs: list[int] = []
    seen = False
    for segment in layout.segments:
        if isinstance(segment, TextSpan):
            cuts = sorted({0, segment.length, *(segment.valid or ())})
            runs += [b - a for a, b in zip(cuts, cuts[1:], strict=False)]
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
        return values.new_zeros(blocks.n, 3).scatter_reduce(0, of, values, reduce, include_self=False)

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
