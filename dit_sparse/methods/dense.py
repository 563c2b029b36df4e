"""Dense attention as a method: the baseline, and what a schedule falls back to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_sparse.method import CallContext, PlanScope
from dit_sparse.plan import BlockPlan


@dataclass(frozen=True)
class DenseMethod:
    """Every query reads every key, through the fastest SDPA backend."""

    name: ClassVar[str] = "dense"
    scope: ClassVar[PlanScope] = "layout"

    def dense_reason(self, ctx: CallContext) -> str | None:
        return "the method is dense"

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        raise ValueError("Expected a sparse method, got dense, which has no plan.")
