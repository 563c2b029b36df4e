"""Piecewise sparse attention: exact where it matters, a Taylor series everywhere else.

PISA (arXiv 2602.01077): the key blocks with the highest pooled scores are read exactly; every other
block is replaced by its mean key and value, and one matrix for all of them adds the first-order
term (equations of section 3; its "hybrid"). Text is read exactly by all, which the public code
leaves to chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dit_sparse import options, selection
from dit_sparse.frame import Frame, frame_of
from dit_sparse.grid import Permutation, TokenLayout
from dit_sparse.method import CallContext, PlanScope
from dit_sparse.plan import BlockPlan, Tail

_DEFAULT_DENSITY = 0.15


@dataclass(frozen=True)
class PisaMethod:
    """PISA: a share of the key blocks exactly, the others by their means.

    Args:
        density: share of the picture's key blocks that every query block reads exactly, rounded
            down; 0.15 if neither this nor mass is given, and then at least one block.
        mass: instead of a density: read the fewest blocks that hold this share of the softmax over
            mean keys.
        tail: what stands for the other blocks: their means (zeroth), those and one first-order
            term for all (first), or those and a term for each (block), which is for study: it takes
            a matrix of D x D per block. none drops them.
        prior: added to the scores: nothing, or the logarithm of the norm of each block's key-value
            covariance, as it is (norm, the public code) or less the mean one (deviation, the
            paper).
        least: blocks that a density reads at least; 0 refuses one of less than a block.
        forced: blocks read in any case, among self, neighbours and first_frame; they are part of
            the density, and come on top of a mass.
        order: order of the picture's tokens, one of raster, FHW and the other axis orders, tile,
            morton, hilbert.
        block: tokens of a block, 64 as in the paper or 128, which is faster on Hopper.
        reuse_steps: denoising steps that a plan serves before a new one is made.
        share_branches: whether the further forwards of a step (guidance) use the plan of the first.

    Raises:
        ValueError: numbers or names out of range.
    """

    density: float | None = None
    mass: float | None = None
    tail: Tail = "first"
    prior: Literal["none", "norm", "deviation"] = "none"
    least: int = 0
    forced: tuple[str, ...] = ()
    order: str = "hilbert"
    block: int = 128
    reuse_steps: int = 1
    share_branches: bool = False

    name: ClassVar[str] = "pisa"
    scope: ClassVar[PlanScope] = "call"

    def __post_init__(self) -> None:
        if self.density is not None and self.mass is not None:
            raise ValueError(
                f"Expected a density or a mass, got both ({self.density} and {self.mass})."
            )
        for field in ("density", "mass"):
            options.check_share(field, getattr(self, field))
        options.check_choice("tail", self.tail, ("none", "zeroth", "first", "block"))
        options.check_choice("prior", self.prior, ("none", "norm", "deviation"))
        forced = options.check_planning(
            order=self.order,
            least=self.least,
            block=self.block,
            reuse_steps=self.reuse_steps,
            forced=self.forced,
        )
        object.__setattr__(self, "forced", forced)

    def dense_reason(self, ctx: CallContext) -> str | None:
        return None

    def token_order(self, layout: TokenLayout, device: torch.device) -> Permutation | None:
        """See `dit_sparse.method.Ordered`."""
        return frame_of(layout, self.block, self.order, device=device).order

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        """The plan of a call.

        Raises:
            ValueError: a density of less than one block, or a prior without values in the context.
        """
        frame = frame_of(ctx.layout, self.block, self.order, device=q.device)
        if ctx.ordered:
            frame = frame.in_order
        scores = selection.pooled_scores(q, k, frame, summaries=ctx.summaries, tail=self.tail)
        if self.prior != "none":
            scores = scores + self._prior(k, ctx, frame, q.shape[1])[:, :, None]
        scores = selection.of_picture(scores, frame)
        forced = selection.forced_blocks(frame, self.forced)
        most = frame.candidates if self.mass is not None else self._count(frame)
        if forced is None:
            return selection.plan_of_ranks(scores, frame, (most,), mass=self.mass, tail=self.tail)
        if self.mass is not None:
            chosen = selection.top_p(scores, self.mass)
        else:  # forced blocks come first, and the others get what is left of the density
            chosen = selection.top_k(scores.masked_fill(forced, torch.inf), most)
        level = (chosen | forced).to(torch.uint8)
        uneven = self.mass is not None
        return selection.plan_of_selection(level, frame, tail=self.tail, uneven=uneven)

    def _count(self, frame: Frame) -> int:
        if self.density is None:  # nobody asked for so few
            return options.blocks_for(_DEFAULT_DENSITY, frame, max(1, self.least))
        return options.blocks_for(self.density, frame, self.least)

    def _prior(self, k: Tensor, ctx: CallContext, frame: Frame, heads: int) -> Tensor:
        if ctx.values is None:
            raise ValueError(
                f"Expected the values of the call for prior={self.prior!r}, got none. Pass them "
                "as CallContext.values, or choose prior='none'."
            )
        norms = selection.covariance_norms(
            *(k, ctx.values, frame),
            centred=self.prior == "deviation",
            summaries=ctx.summaries,
        )
        prior = (norms + 1e-5).log()
        group = heads // k.shape[1]
        return prior if group == 1 else prior.repeat_interleave(group, dim=1)
