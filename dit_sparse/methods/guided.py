"""A choice of blocks from q and k that is guided by what a calibration found.

Every head has PARO's order (arXiv 2506.16054), and blocks are chosen in each call by the scores of
mean queries and mean keys, as in PISA (arXiv 2602.01077). Blocks of the calibrated mask have a
bonus on their scores: what held mass on the calibration prompts is likely to hold it again, and
what the prompt at hand needs besides is found all the same. The combination is nobody's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from torch import Tensor

from dit_sparse import options, selection
from dit_sparse.method import CallContext, PlanScope
from dit_sparse.methods.paro import ParoMethod
from dit_sparse.model_identity import ModelIdentity
from dit_sparse.plan import BlockPlan


@dataclass(frozen=True)
class GuidedMethod:
    """Blocks chosen from q and k, with a calibration of PARO for a prior.

    Args:
        path: folder or Hub repository of the calibration; see `dit-sparse calibrate`.
        density: share of the picture's key blocks that every query block reads exactly, rounded
            down, and at least one.
        bonus: added to the scores, which are exponents of the softmax, of blocks in the mask: 0
            leaves the choice to q and k alone, a large one takes the mask's blocks first.
        tail: what stands for the blocks that are not read: nothing (none), or their mean key and
            value (zeroth, from PISA).
        reuse_steps: denoising steps that a plan serves before a new one is made.
        share_branches: whether the further forwards of a step (guidance) use the plan of the first.

    Raises:
        ValueError: no whole calibration is there, or numbers or names out of range.
    """

    path: str
    density: float = 0.2
    bonus: float = 2.0
    tail: Literal["none", "zeroth"] = "none"
    reuse_steps: int = 1
    share_branches: bool = False

    name: ClassVar[str] = "guided"
    scope: ClassVar[PlanScope] = "call"

    def __post_init__(self) -> None:
        if self.density is None:
            raise ValueError("Expected a density above 0 and at most 1, got None.")
        options.check_share("density", self.density)
        if not (options.is_number(self.bonus) and 0.0 <= self.bonus < math.inf):
            raise ValueError(f"Expected a finite bonus of at least 0, got {self.bonus!r}.")
        if type(self.reuse_steps) is not int or self.reuse_steps < 1:
            raise ValueError(f"Expected reuse_steps of at least 1, got {self.reuse_steps!r}.")
        _ = self.paro  # what cannot be read is refused now, not in the first forward

    @cached_property
    def paro(self) -> ParoMethod:
        """The calibration's orders and masks."""
        return ParoMethod(self.path, self.tail)

    def dense_reason(self, ctx: CallContext) -> str | None:
        return None

    def check_model(self, model: ModelIdentity) -> None:
        """Refuses a model other than the calibrated one, as `ParoMethod` does."""
        self.paro.check_model(model)

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        """The plan of a call; raises what `ParoMethod.plan` does."""
        frame = self.paro.frame(q, ctx)
        if k.shape[1] != q.shape[1]:  # every head of q has an order of its own
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = selection.pooled_scores(q, k, frame)
        scores = scores + self.bonus * self.paro.levels(frame, q, ctx)
        count = options.blocks_for(self.density, frame, 1)
        scores = selection.of_picture(scores, frame)
        return selection.plan_of_ranks(scores, frame, (count,), tail=self.tail)
