"""CLEAR's windows (arXiv 2412.16112): circles around every query, cut at the borders."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse import per_axis
from dit_sparse.coarse import squares
from dit_sparse.grid import TokenLayout
from dit_sparse.method import CallContext, PlanScope
from dit_sparse.neighbourhood import Within, whole
from dit_sparse.plan import BlockPlan
from dit_sparse.predicate import DiskPredicate
from dit_sparse.tile_lists import Reach, Tiling, Visits
from dit_sparse.tiling import best_tile_for
from dit_sparse.window_plan import assemble, of_layout, tile_grid

_MOST = 32_767  # rows and columns: sums of two squares stay in 32 bits


@dataclass(frozen=True)
class DiskMethod:
    """A query reads the keys less than a radius away, in all frames, and all text.

    CLEAR's models are distilled for such windows. Without their weights take a radius of at least
    half the grid that the model was trained on.

    Args:
        radius: in tokens; a key at exactly this distance is not read.
        trained_tokens: length of the sequence that the model was trained on, text included, to
            multiply the scale of the scores by sqrt(ln(tokens) / ln(trained_tokens)) on a longer
            one; CLEAR's is 64 * 64 + 512 = 4608. By default the scale stays. With low resolution
            the first logarithm is that of 10 times as many tokens, as CLEAR has it.
        down_factor: side of the squares of tokens whose mean keys and values every query of the
            picture reads besides; CLEAR's is 4. They count as one key each, and what stands in the
            circle is read twice. CLEAR learns the weights of a square's tokens, which begin as
            their mean; here they stay that. `None`: no low resolution.
        tile: tokens per axis of the tiles that blocks are cut from; by default the shape that
            should take the least time on this grid.
        block: tokens a block holds at most: 64 or 128.

    Raises:
        ValueError: numbers of another type or range.
    """

    radius: int | float = 16
    trained_tokens: int | None = None
    tile: tuple[int, ...] | None = None
    block: int = 128
    down_factor: int | None = None

    name: ClassVar[str] = "disk"
    scope: ClassVar[PlanScope] = "layout"

    def __post_init__(self) -> None:
        number = isinstance(self.radius, (int, float)) and not isinstance(self.radius, bool)
        if not number or not 0.0 < self.radius <= _MOST:  # NaN fails too
            raise ValueError(
                f"Expected a radius above 0 and at most {_MOST} tokens, got {self.radius!r}."
            )
        trained = self.trained_tokens
        if trained is not None and (not per_axis.is_count(trained) or trained < 2):
            raise ValueError(f"Expected trained_tokens of at least 2, got {trained!r}.")
        per_axis.check_block(self.block)
        if self.down_factor is not None and not per_axis.is_count(self.down_factor):
            raise ValueError(
                f"Expected a down_factor of at least 1 token, got {self.down_factor!r}."
            )
        if self.tile is not None:
            object.__setattr__(self, "tile", per_axis.counts(self.tile, "tile"))

    def dense_reason(self, ctx: CallContext) -> str | None:
        return None

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        """The plan of a layout; waits for the device once.

        Raises:
            ValueError: a grid of more than 32,767 rows or columns, or a tile that does not fit it.
        """
        layout = ctx.layout
        frames, height, width = layout.grid.shape
        if max(height, width) > _MOST:
            raise ValueError(
                f"Expected at most {_MOST} rows and columns for disks, got the grid {layout.grid}."
            )
        reach = math.ceil(self.radius) - 1
        axes = (whole(frames), Within(height, reach), Within(width, reach))
        intervals = tuple(axis.intervals() for axis in axes)
        tile = best_tile_for((axes,), self.block)
        if self.tile is not None:
            tile = per_axis.tokens(self.tile, "tile", layout.grid, layout.grid.shape)
        tiling = tile_grid(intervals, tile, self.block, q.device)
        around = [Reach.of(i, cut) for i, cut in zip(intervals, tiling.cuts, strict=True)]
        visits, masked = _in_reach(Visits.of(around, q.device), tiling, self._limit)
        disk = _disk(tiling, layout, self._limit) if masked else None
        plan = assemble(layout, tiling, [visits], self.block, disk=disk)
        coarse = None
        if self.down_factor is not None:
            coarse = squares(layout, self.down_factor, self.block, q.device)
        return replace(plan, scale=self.scale(layout), coarse=coarse)

    @property
    def _limit(self) -> int:
        """Squared distances are integers: below the squared radius is below this."""
        return math.ceil(self.radius**2)

    def scale(self, layout: TokenLayout) -> float:
        """Factor of the scale of the scores."""
        if self.trained_tokens is None or layout.length < 2:
            return 1.0
        tokens = layout.length * (10 if self.down_factor else 1)
        return math.sqrt(math.log(tokens) / math.log(self.trained_tokens))


def _in_reach(square: Visits, tiling: Tiling, limit: int) -> tuple[Visits, bool]:
    """Of the tiles in a square those with a visible pair of tokens, and whether any is masked."""
    near = torch.zeros_like(square.row)
    far = torch.zeros_like(square.row)
    q_tile, k_tile = square.row, square.key
    for cut in reversed(tiling.cuts[1:]):
        first, last = cut[:-1].to(tiling.device), cut[1:].to(tiling.device) - 1
        n = len(first)
        q, k = q_tile % n, k_tile % n
        q_tile, k_tile = q_tile // n, k_tile // n
        gap = torch.maximum(first[k] - last[q], first[q] - last[k]).clamp(min=0)
        span = torch.maximum(last[k] - first[q], last[q] - first[k])
        near += gap * gap
        far += span * span
    kept = square.filtered(near < limit, far < limit)
    return kept, not bool(kept.full.all())


def _disk(tiling: Tiling, layout: TokenLayout, limit: int) -> DiskPredicate:
    frames, height, width = (torch.arange(extent) for extent in layout.grid.shape)
    at = tiling.spread([torch.zeros_like(frames), height << 16, width])
    centre = of_layout(at, layout, 0)[None]
    return DiskPredicate(
        centre=centre,
        limit=torch.full_like(centre, min(limit, torch.iinfo(torch.int32).max)),
        key=of_layout(at, layout, -1),
    )
