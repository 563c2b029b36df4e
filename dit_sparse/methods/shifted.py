"""Disjoint windows that are shifted, at random or by half (HiDiffusion, Swin)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from dit_sparse import per_axis
from dit_sparse.grid import TokenGrid
from dit_sparse.method import CallContext, PlanScope
from dit_sparse.neighbourhood import Axis, Neighbourhood, Partition, Rolled
from dit_sparse.per_axis import Extents
from dit_sparse.plan import BlockPlan
from dit_sparse.tiling import best_tile_for
from dit_sparse.window_plan import Axes, plan_windows


@dataclass(frozen=True)
class ShiftedMethod:
    """The grid in disjoint windows after a roll: MSW-MSA of HiDiffusion (arXiv 2311.17528).

    Rolling moves the windows and makes those at the borders wrap around; with `wrap` off they end
    at the border instead, which is Swin's region mask (arXiv 2103.14030). Where windows do not
    divide a wrapping axis the last one is moved inwards; HiDiffusion resizes the picture there.

    Args:
        window: tokens (int) or share of the axis (float, rounded up) per axis, as (frames, height,
            width) or (height, width); by default two windows along height and width.
        shift: tokens (int) or share of the window (float) that the grid is rolled by per axis,
            towards its beginning; or "random": 0, 1, 2 or 3 quarters of the window, drawn
            for each step and layer.
        wrap: whether windows wrap around the borders.
        seed: of the random shifts.
        block: tokens a block holds at most: 64 or 128.

    Raises:
        ValueError: numbers of another type or range; the sentence names the axis.
    """

    window: tuple[int | float, ...] = (1.0, 0.5, 0.5)
    shift: tuple[int | float, ...] | Literal["random"] = "random"
    wrap: bool = True
    seed: int = 0
    block: int = 128

    name: ClassVar[str] = "shifted"

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", per_axis.checked(self.window, "window", shares=True))
        if self.shift != "random":
            object.__setattr__(self, "shift", _shifts(self.shift))
        if not isinstance(self.wrap, bool):
            raise ValueError(f"Expected wrap as true or false, got {self.wrap!r}.")
        if type(self.seed) is not int:
            raise ValueError(f"Expected an integer seed, got {self.seed!r}.")
        per_axis.check_block(self.block)

    @property
    def scope(self) -> PlanScope:
        """Random shifts differ from call to call."""
        return "call" if self.shift == "random" else "layout"

    def dense_reason(self, ctx: CallContext) -> str | None:
        return None

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        """The plan of a call.

        Raises:
            ValueError: random shifts in a step that is not known, or windows and shifts that do
                not fit the grid.
        """
        grid = ctx.layout.grid
        window = per_axis.tokens(self.window, "window", grid, grid.shape, round_up=True)
        axes = self._axes(grid, window, self._shift(grid, window, ctx))
        tile = best_tile_for((axes,), self.block)
        return plan_windows(ctx.layout, [axes], tile, self.block, q.device)

    def _axes(self, grid: TokenGrid, window: Extents, shift: Extents) -> Axes:
        def axis(extent: int, size: int, by: int) -> Axis:
            if size == extent:
                return Neighbourhood(extent, size)
            if self.wrap:
                return Rolled(Neighbourhood(extent, size, size), by)
            return Partition(extent, size, by % size)

        frames, rows, columns = map(axis, grid.shape, window, shift)
        return frames, rows, columns

    def _shift(self, grid: TokenGrid, window: Extents, ctx: CallContext) -> Extents:
        if self.shift == "random":
            if ctx.step is None:
                raise ValueError(
                    "Expected to know the denoising step for random shifts, got a forward outside "
                    "a pipeline. Apply the method to the pipeline, pass steps=, or give a shift."
                )
            quarters = random.Random(f"{self.seed} {ctx.step} {ctx.layer}").randrange(4)
            frames, rows, columns = (quarters * size // 4 for size in window)
            return frames, rows, columns
        given = (*[0] * (3 - len(self.shift)), *self.shift)
        per_axis.of_rank(self.shift, "shift", grid)
        frames, rows, columns = (
            int(by * size) if isinstance(by, float) else int(by)
            for by, size in zip(given, window, strict=True)
        )
        return frames, rows, columns


def _shifts(value: object) -> tuple[int | float, ...]:
    if not isinstance(value, (tuple, list)) or len(value) not in (1, 2, 3):
        raise ValueError(
            f'Expected shift as one number per axis or "random", got {value!r}. Give one for each '
            "of (frames, height, width)."
        )
    for axis, by in zip(per_axis.AXES[-len(value) :], value, strict=True):
        share = isinstance(by, float) and 0.0 <= by < 1.0
        if not share and not (type(by) is int and by >= 0):
            raise ValueError(
                f"Expected a shift along {axis} of at least 0 tokens, an integer, or a share of "
                f"the window below 1.0, got {by!r}."
            )
    return tuple(value)
