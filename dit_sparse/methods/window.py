"""Sliding-window attention over the token grid, in tiles.

Generalized neighbourhood attention (arXiv 2504.16922): per axis a window of w tokens, pushed
inwards at the borders so that every query reads exactly w keys, and a stride s that lets groups of
s queries share the window of their middle one. Stride 1 is neighbourhood attention (NATTEN,
arXiv 2204.07143); stride = tile with windows of odd multiples of the tile is sliding tile
attention (arXiv 2502.04507). Text and reference images are read by all queries and read all keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse import orders
from dit_sparse.grid import TextSpan, TokenGrid, TokenLayout
from dit_sparse.method import CallContext, PlanScope
from dit_sparse.plan import BlockPlan, Blocks, BoxPredicate
from dit_sparse.tiling import Extents, WindowShape, best_tile, span, window_for_density

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
        stride: queries per axis that share one window, at most the window; one number or one per
            axis. By default 1 for a window and the tile for a density.
        tile: tokens per axis of the tiles that blocks are cut from; by default the shape that
            should take the least time on this grid.
        block: tokens a block holds at most: 64 or 128.

    Raises:
        ValueError: numbers of another type or range; the sentence names the axis.
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
        density = self.density
        if density is not None and not (_number(density) and 0.0 < density <= 1.0):  # NaN fails too
            raise ValueError(
                f"Expected a density above 0 and at most 1, got {density!r}. Give a share of the "
                "blocks, such as 0.3."
            )
        if type(self.block) is not int or self.block not in (64, 128):
            raise ValueError(f"Expected a block of 64 or 128 tokens, got {self.block!r}.")
        per_axis = isinstance(self.stride, (tuple, list))
        if self.stride is not None and not per_axis and not _count(self.stride):
            raise ValueError(
                "Expected a stride of at least 1, as one integer or one per axis, "
                f"got {self.stride!r}."
            )
        for name in ("window", "tile", *(["stride"] if per_axis else [])):
            value = getattr(self, name)
            if value is not None:  # a list would leave the method without a hash
                object.__setattr__(self, name, _axes(value, name))

    def dense_reason(self, ctx: CallContext) -> str | None:
        return None

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        layout, grid = ctx.layout, ctx.layout.grid
        shape = self.shape_on(grid)
        spans = [span(*a) for a in zip(grid.shape, shape.window, shape.stride, strict=True)]
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
            ValueError: a window or a tile larger than its axis, a stride larger than its window
                (one stride for all axes is 1 along an axis of one token), or two numbers on a
                grid of several frames; the sentence names the axis.
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
            stride = tuple(stride if extent > 1 else 1 for extent in grid.shape)
        stride = _tokens(stride, "stride", grid, window)
        return WindowShape(window, stride, tile or best_tile(grid, window, stride, self.block))


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _axes(value: object, name: str) -> tuple[int | float, ...]:
    """One number per axis as a tuple; windows may have shares among them."""
    shares = name == "window"
    if not isinstance(value, (tuple, list)) or len(value) not in (2, 3):
        raise ValueError(
            f"Expected {name} as (frames, height, width) or (height, width), got {value!r}. "
            "Give one number per axis."
        )
    for axis, size in zip(_AXES[-len(value) :], value, strict=True):
        if not _count(size) and not (shares and isinstance(size, float) and 0.0 < size <= 1.0):
            share = ", or a share of the axis above 0.0 and at most 1.0" if shares else ""
            raise ValueError(
                f"Expected a {name} along {axis} of at least 1 token, an integer{share}, "
                f"got {size!r}."
            )
    return tuple(value)


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
        if isinstance(size, float):
            tokens.append(max(1, round(size * extent)))
        elif size <= limit:
            tokens.append(size)
        else:
            raise ValueError(
                f"Expected a {name} along {axis} between 1 and {limit} tokens, "
                f"got {size!r} on the grid {grid}."
            )
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
