"""Sliding tile attention (arXiv 2502.04507): windows of whole tiles, so that nothing is masked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from dit_sparse import per_axis
from dit_sparse.grid import TokenGrid
from dit_sparse.method import CallContext, PlanScope
from dit_sparse.model_identity import ModelIdentity
from dit_sparse.neighbourhood import SlidingTiles
from dit_sparse.per_axis import Extents
from dit_sparse.plan import BlockPlan
from dit_sparse.window_plan import Axes, plan_windows
from dit_sparse.window_table import WindowTable, load_table


@dataclass(frozen=True)
class SlidingTileMethod:
    """Every tile of queries reads the tiles around it, moved inwards at the borders.

    With an odd number of tiles that divide the grid this is a window of `tile * window` tokens
    strided by the tile. Tiles need not divide the grid: those at the far borders are smaller.

    Args:
        window: tiles per axis, as (frames, height, width), (height, width) for images, or a tuple
            of these, one per head (in words 3x3x3,1x6x10). An even number reads as many as the next
            odd one; as many as the grid has, or more, read all of the axis.
        tile: tokens of a tile per axis, likewise; more than the axis has mean all of it.
        block: tokens a block holds at most: 64 or 128. Larger tiles take several.
        table: what `dit-sparse calibrate --method sta` wrote, a folder or file with windows for
            each segment of the steps, layer and head, in place of `window` and `tile`.

    Raises:
        ValueError: numbers below 1 (the sentence names the axis), a file that is no table or
            cannot be read.
    """

    window: tuple[int, ...] | tuple[tuple[int, ...], ...] = (3, 3, 3)
    tile: tuple[int, ...] = (6, 8, 8)
    block: int = 128
    table: str | None = None

    name: ClassVar[str] = "sta"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tile", per_axis.counts(self.tile, "tile"))
        per_axis.check_block(self.block)
        _ = self._found  # what is wrong with a table is said before the first call
        heads = self.window if per_axis.per_head(self.window) else (self.window,)
        checked = tuple(per_axis.counts(w, "window", unit="tile") for w in heads)
        object.__setattr__(
            self, "window", checked if per_axis.per_head(self.window) else checked[0]
        )

    @cached_property
    def _found(self) -> WindowTable | None:
        if self.table is None:
            return None
        try:
            return load_table(self.table)
        except OSError as error:
            raise ValueError(
                f"Expected to read a table of windows in {self.table!r}, got {error.strerror!r}. "
                "Give what dit-sparse calibrate --method sta or save_table wrote."
            ) from error

    @property
    def scope(self) -> PlanScope:
        """A table has windows for each layer, and may have others for each segment."""
        if self._found is None:
            return "layout"
        return "layer" if len(self._found.windows) == 1 else "segment"

    def segment(self, ctx: CallContext) -> int:
        """The segment of the call's step.

        Raises:
            ValueError: a table of several segments for another number of steps.
        """
        return 0 if self._found is None else self._found.segment(ctx.step, ctx.steps)

    def check_model(self, model: ModelIdentity) -> None:
        """Refuses a model of another class or configuration than that of the table.

        Raises:
            ValueError: it is another.
        """
        own = None if self._found is None else self._found.model
        if own is not None and not own.agrees(model):
            raise ValueError(
                f"Expected the model of the windows in {self.table!r}, {own}, got {model}. Search "
                "windows for this model."
            )

    def dense_reason(self, ctx: CallContext) -> str | None:
        return None

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        """The plan of a layer.

        Raises:
            ValueError: numbers for another rank, or a table for another grid, model or number of
                steps.
        """
        grid = ctx.layout.grid
        tile, heads = self.tile, self.window
        if (found := self._found) is not None:
            tile = found.tile
            heads = found.of_layer(ctx.layer, ctx.layers, grid, self.segment(ctx))
        elif not per_axis.per_head(heads):
            heads = (heads,)  # type: ignore[assignment]
        tile = per_axis.clipped(tile, "tile", grid)
        axes = [_axes(grid, tile, window) for window in heads]  # type: ignore[arg-type]
        return plan_windows(ctx.layout, axes, tile, self.block, q.device)


def _axes(grid: TokenGrid, tile: Extents, window: tuple[int, ...]) -> Axes:
    counts = per_axis.of_rank(window, "window", grid)
    frames, rows, columns = (
        SlidingTiles(extent, edge, int(count))
        for extent, edge, count in zip(grid.shape, tile, counts, strict=True)
    )
    return frames, rows, columns
