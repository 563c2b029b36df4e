"""Sliding-window attention over the token grid, in tiles.

Generalized neighbourhood attention (arXiv 2504.16922): per axis a window of w tokens, pushed
inwards at the borders so that every query reads exactly w keys, and a stride s that lets groups of
s queries share the window of their middle one. Stride 1 is neighbourhood attention (NATTEN,
arXiv 2204.07143), dilated it is DiNAT's (arXiv 2209.15001); stride = window is blocked attention;
stride = tile with windows of odd multiples of the tile is sliding tile attention
(arXiv 2502.04507). Text and reference images are read by all queries and read all keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

from torch import Tensor

from dit_sparse import per_axis
from dit_sparse.grid import TokenGrid
from dit_sparse.method import CallContext, PlanScope
from dit_sparse.neighbourhood import Borders, Neighbourhood
from dit_sparse.per_axis import Extents
from dit_sparse.plan import BlockPlan
from dit_sparse.tiling import WindowShape, best_tile_for, window_for_density
from dit_sparse.window_plan import plan_windows

_DEFAULT_DENSITY = 0.3

_Window: TypeAlias = tuple[int | float, ...]


@dataclass(frozen=True)
class WindowMethod:
    """A window around every query.

    Args:
        window: tokens (int) or share of the axis (float) per axis, as (frames, height, width),
            (height, width) for images or (width,) for sequences; one integer for all axes; a tuple
            of such windows, one per head (in words 9x15x24,21x5x5); or "auto" (or nothing) for a
            density.
        density: instead of a window: the share of blocks to visit, spread evenly over the axes;
            windows are then multiples of the tile. 0.3 if neither is given.
        stride: queries per axis that share one window, at most the window; one number or one per
            axis. By default 1 for a window, and for a density one tile or two.
        dilation: distance of neighbouring keys of a window; one number or one per axis.
            Window times dilation is at most the axis.
        causal: hide what comes later along an axis; true or false for all axes or for each.
        borders: what windows do at the borders: move "inward", or be "truncated".
        tile: tokens per axis of the tiles that blocks are cut from; by default the shape that
            should take the least time on this grid. Tokens of one dilation group count.
        block: tokens a block holds at most: 64 or 128.

    Raises:
        ValueError: numbers of another type or range; the sentence names the axis.
    """

    window: int | _Window | tuple[_Window, ...] | Literal["auto"] | None = None
    density: float | None = None
    stride: int | tuple[int, ...] | None = None
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    borders: Borders = "inward"
    tile: tuple[int, ...] | None = None
    block: int = 128

    name: ClassVar[str] = "window"
    scope: ClassVar[PlanScope] = "layout"

    def __post_init__(self) -> None:
        if self.window == "auto":
            object.__setattr__(self, "window", None)
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
        per_axis.check_block(self.block)
        if self.borders not in get_args(Borders):
            raise ValueError(
                f"Expected borders among {', '.join(get_args(Borders))}, got {self.borders!r}."
            )
        self._freeze_axes()
        rules = (self.dilation != 1, self.causal is not False, self.borders != "inward")
        if self.window is None and any(rules):
            raise ValueError(
                "Expected a window for dilation, causality or truncated borders, got none. A "
                "density finds plain windows only: give window=."
            )

    def _freeze_axes(self) -> None:
        """Checks what has one value per axis; lists would leave the method without a hash."""
        frozen: dict[str, object] = {}
        if isinstance(self.window, (int, float)):
            per_axis.check_everywhere(self.window, "window")
        elif self.window is not None:
            heads = self.window if per_axis.per_head(self.window) else (self.window,)
            checked = tuple(per_axis.checked(w, "window", shares=True) for w in heads)
            frozen["window"] = checked if per_axis.per_head(self.window) else checked[0]
        for name, value in (("stride", self.stride), ("dilation", self.dilation)):
            if isinstance(value, (tuple, list)):
                frozen[name] = per_axis.checked(value, name)
            elif value is not None:
                per_axis.check_everywhere(value, name)
        if self.tile is not None:
            frozen["tile"] = per_axis.checked(self.tile, "tile")
        if not isinstance(self.causal, bool):
            frozen["causal"] = per_axis.flags(self.causal, "causal")
        for name, fixed in frozen.items():
            object.__setattr__(self, name, fixed)

    def dense_reason(self, ctx: CallContext) -> str | None:
        return None

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        shapes = self.shapes_on(ctx.layout.grid)
        heads = [self.axes_on(ctx.layout.grid, shape.window, shape.stride) for shape in shapes]
        return plan_windows(ctx.layout, heads, shapes[0].tile, self.block, q.device)

    def shape_on(self, grid: TokenGrid, head: int = 0) -> WindowShape:
        """Window, stride and tile of a head in tokens on a grid; see `shapes_on`."""
        shapes = self.shapes_on(grid)
        return shapes[head % len(shapes)]

    def shapes_on(self, grid: TokenGrid) -> tuple[WindowShape, ...]:
        """Windows, strides and their tile in tokens on a grid, one for each head or one for all.

        Raises:
            ValueError: a window times its dilation or a tile larger than its axis, a stride larger
                than its window (one number for all axes is 1 along an axis of one token), or fewer
                numbers than the grid has axes; the sentence names the axis.
        """
        tile = None if self.tile is None else per_axis.tokens(self.tile, "tile", grid, grid.shape)
        if self.window is None:
            shape = window_for_density(grid, self.density or _DEFAULT_DENSITY, self.block, tile)
            if self.stride is None:
                return (shape,)
            windows: tuple[Extents, ...] = (shape.window,)
        else:
            windows = self._windows(grid)
        strides = [self._stride(grid, window) for window in windows]
        pairs = list(zip(windows, strides, strict=True))
        if tile is None:
            tile = best_tile_for(tuple(self.axes_on(grid, *pair) for pair in pairs), self.block)
        return tuple(WindowShape(window, stride, tile) for window, stride in pairs)

    def _windows(self, grid: TokenGrid) -> tuple[Extents, ...]:
        if isinstance(self.window, int):
            given: tuple[_Window, ...] = (per_axis.everywhere(self.window, grid),)
        else:
            given = self.window if per_axis.per_head(self.window) else (self.window,)  # type: ignore[assignment]
        step = self._dilation(grid)
        frames, rows, columns = (n // d for n, d in zip(grid.shape, step, strict=True))
        limits = (frames, rows, columns)
        return tuple(per_axis.tokens(window, "window", grid, limits, step) for window in given)

    def _stride(self, grid: TokenGrid, window: Extents) -> Extents:
        stride = self.stride or 1
        if isinstance(stride, int):
            stride = per_axis.everywhere(stride, grid)
        return per_axis.tokens(stride, "stride", grid, window)

    def _dilation(self, grid: TokenGrid) -> Extents:
        step = self.dilation
        if isinstance(step, int):
            step = per_axis.everywhere(step, grid)
        return per_axis.tokens(step, "dilation", grid, grid.shape)

    def axes_on(
        self, grid: TokenGrid, window: Extents, stride: Extents
    ) -> tuple[Neighbourhood, Neighbourhood, Neighbourhood]:
        """The rule of each axis, for a window and a stride of `shapes_on`."""
        causal = (self.causal,) * 3 if isinstance(self.causal, bool) else self.causal
        ahead = map(bool, per_axis.of_rank(causal, "causal", grid))
        frames, rows, columns = (
            Neighbourhood(extent, w, s, d, hides, self.borders, axis)
            for extent, w, s, d, hides, axis in zip(
                grid.shape, window, stride, self._dilation(grid), ahead, per_axis.AXES, strict=True
            )
        )
        return frames, rows, columns


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
