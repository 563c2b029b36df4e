"""A plan made before, run as it is: what a search or another method found, kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_sparse.method import CallContext, PlanScope
from dit_sparse.plan import BlockPlan
from dit_sparse.plan_check import check_for


@dataclass(frozen=True)
class SavedPlan:
    """The same plan in every call; see `dit_sparse.plan_io.load_plan`.

    Args:
        saved: the plan. It fits one layout only: a call of another length is refused.
    """

    saved: BlockPlan

    name: ClassVar[str] = "saved"
    scope: ClassVar[PlanScope] = "layout"

    def dense_reason(self, ctx: CallContext) -> str | None:
        return None

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        """The plan on the device of `q`.

        Raises:
            ValueError: the plan is for another grid, text length, batch size or number of heads.
        """
        return check_for(self.saved.to(q.device), q, k)
