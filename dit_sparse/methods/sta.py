"""Sliding tile attention (arXiv 2502.04507): windows of whole tiles, so that nothing is masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_sparse import per_axis
from dit_sparse.grid import TokenGrid
from dit_sparse.method import CallContext, PlanScope
from dit_sparse.neighbourhood import SlidingTiles
from dit_sparse.per_axis import Extents
from dit_sparse.plan import BlockPlan
from dit_sparse.window_plan import Axes, plan_windows
from dit_sparse.window_table import load_table


@dataclass(frozen=True)
class SlidingTileMethod:
    """Every tile of queries reads the tiles around it, moved inwards at the borders.

    With an odd number of tiles that divide the grid this is a window of `tile * window` tokens
    strided by the tile. Tiles need not divide the grid: those at the far borders are smaller.

    Args:
        window: tiles per axis, as (frames, height, width), (height, width) for images, or a tuple
            of these, one per head. An even number reads as many as the next odd one; as many as
            the grid has, or more, read all of the axis.
        tile: tokens of a tile per axis, likewise; more than the axis has mean all of it.
        block: tokens a block holds at most: 64 or 128. Larger tiles take several.
        table: a file that `window_table.save_table` wrote, with windows for each layer and head, in
            place of `window` and `tile`; see `window_search.search`.

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
        if self.table is not None:
            self._check_table(self.table)
        heads = self.window if per_axis.per_head(self.window) else (self.window,)
        checked = tuple(per_axis.counts(w, "window", unit="tile") for w in heads)
        object.__setattr__(
            self, "window", checked if per_axis.per_head(self.window) else checked[0]
        )

    @staticmethod
    def _check_table(path: str) -> None:
        """What is wrong with a table is said before the first call."""
        try:
            load_table(path)
        except OSError as error:
            raise ValueError(
                f"Expected to read a table of windows in {path!r}, got {error.strerror!r}. Give a "
                "file that save_table wrote."
            ) from error

    @property
    def scope(self) -> PlanScope:
        """A table has windows for each layer."""
        return "layout" if self.table is None else "layer"

    def dense_reason(self, ctx: CallContext) -> str | None:
        return None

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        """The plan of a layer.

        Raises:
            ValueError: numbers for another rank, or a table for another grid or model.
        """
        grid = ctx.layout.grid
        tile, heads = self.tile, self.window
        if self.table is not None:
            found = load_table(self.table)
            tile, heads = found.tile, found.of_layer(ctx.layer, ctx.layers, grid)
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
