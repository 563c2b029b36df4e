"""FreeSwim's windows (arXiv 2511.14712): as much around a query as the model saw in training."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from dit_sparse import per_axis
from dit_sparse.method import CallContext, PlanScope
from dit_sparse.neighbourhood import Neighbourhood, whole
from dit_sparse.plan import BlockPlan
from dit_sparse.tiling import best_tile_for
from dit_sparse.window_plan import plan_windows


@dataclass(frozen=True)
class FreeSwimMethod:
    """All frames, and as many rows and columns as the model saw in training.

    The window reaches half the training grid to every side, 2 (n // 2) + 1 tokens of an axis, and
    is moved inwards at the borders: neighbourhood attention with an odd window. FreeSwim's
    second branch, whose full attention serves the cross-attention, is the pipeline's business and
    is not here.

    Args:
        base: tokens of the training grid, (height, width); 30x52 is Wan at 480x832.
        scaled: multiply the scale of the scores by sqrt(ln(2 n) / ln n), n tokens of the base, as
            FreeSwim's code does for 30x52.
        block: tokens a block holds at most: 64 or 128.

    Raises:
        ValueError: numbers below 1; the sentence names the axis.
    """

    base: tuple[int, ...] = (30, 52)
    scaled: bool = True
    block: int = 128

    name: ClassVar[str] = "freeswim"
    scope: ClassVar[PlanScope] = "layout"

    def __post_init__(self) -> None:
        base = per_axis.counts(self.base, "base")
        if len(base) != 2 or math.prod(base) < 2:
            raise ValueError(
                f"Expected base as (height, width) of a grid of 2 tokens or more, got {self.base}."
            )
        if not isinstance(self.scaled, bool):
            raise ValueError(f"Expected scaled as true or false, got {self.scaled!r}.")
        per_axis.check_block(self.block)
        object.__setattr__(self, "base", base)

    def dense_reason(self, ctx: CallContext) -> str | None:
        return None

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        frames, height, width = ctx.layout.grid.shape
        rows, columns = (
            Neighbourhood(extent, min(2 * (n // 2) + 1, extent))
            for extent, n in zip((height, width), self.base, strict=True)
        )
        axes = (whole(frames), rows, columns)
        tile = best_tile_for((axes,), self.block)
        plan = plan_windows(ctx.layout, [axes], tile, self.block, q.device)
        return replace(plan, scale=self.scale)

    @property
    def scale(self) -> float:
        """Factor of the scale of the scores."""
        tokens = math.prod(self.base)
        return math.sqrt(math.log(2 * tokens) / math.log(tokens)) if self.scaled else 1.0
