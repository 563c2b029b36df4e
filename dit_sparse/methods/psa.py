"""Pyramid sparse attention: levels between reading a key block and skipping it.

PSA (arXiv 2512.04025): the most important key blocks of a query block are read exactly, the next
ones as means of 2, 4 and 8 keys, the others not at all; or, an option that neither paper nor code
has, as one mean each, so that no mass is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dit_sparse import options, pyramid, selection
from dit_sparse.causal import past, plan_of_causal_levels
from dit_sparse.frame import Frame, frame_of
from dit_sparse.grid import Permutation, TokenLayout
from dit_sparse.importance import Norm, sampled_importance
from dit_sparse.method import CallContext, PlanScope
from dit_sparse.plan import BlockPlan, Tail

_FACTORS = (1, 2, 4, 8)
_CAPS = (2, 4, 8)
# Tokens up to which a quarter of them is sampled by default: products grow with the square.
_WELL_SAMPLED = 65_536


@dataclass(frozen=True)
class PsaMethod:
    """PSA: exact, pooled by 2, 4 or 8, or skipped, by the importance of a block.

    Args:
        ends: cumulative shares where the levels 1, 2, 4 and 8 end, ascending; an end equal to the
            one before leaves a level out.
        allocation: shares of the blocks (quantile) or of the importance (mass).
        importance: highest weight between sampled tokens (sampled) or weight between block means
            (means), which costs less.
        share: one in so many tokens of a block is sampled, a power of two; twice as many cost four
            times as much. The public code takes 4, and so does none up to 65,536 tokens, where
            choosing costs little; beyond that it takes 8.
        norm: of the sampled importance: softmax as in the paper, or max as in the public code.
        similarity: thresholds of the likeness of keys for the levels 2, 4 and 8: a block of less
            likeness is read at a finer level; none for no such cap.
        skipped: whether skipped blocks are dropped or read as one mean each (mean).
        least: blocks that shares of the blocks mean at least, the first level taking them; 0
            refuses ends of less than a block.
        forced: blocks read exactly in any case, among self, neighbours and first_frame.
        order: order of the picture's tokens, one of raster, FHW and the other axis orders, tile,
            morton, hilbert.
        block: tokens of a block: 64 or 128.
        causal: no token reads a later one, in the raster order of a picture without text; a block's
            own queries choose for it together, and ends are shares of all blocks, past or not.
        seed: of the sampled places in a block; they change from step to step and layer to layer.
        reuse_steps: denoising steps that a plan serves before a new one is made.
        share_branches: whether the further forwards of a step (guidance) use the plan of the first.

    Raises:
        ValueError: ends or other options out of range.
    """

    ends: tuple[float, ...] = (0.05, 0.10, 0.15, 0.25)
    allocation: pyramid.Allocation = "quantile"
    importance: Literal["sampled", "means"] = "sampled"
    share: int | None = None
    norm: Norm = "softmax"
    similarity: tuple[float, ...] | None = None
    skipped: Literal["drop", "mean"] = "drop"
    least: int = 0
    forced: tuple[str, ...] = ()
    order: str = "hilbert"
    block: int = 128
    causal: bool = False
    seed: int = 0
    reuse_steps: int = 1
    share_branches: bool = False

    name: ClassVar[str] = "psa"
    scope: ClassVar[PlanScope] = "call"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", _ends(self.ends))
        if self.similarity is not None:
            object.__setattr__(self, "similarity", _similarity(self.similarity))
        options.check_choice("allocation", self.allocation, ("quantile", "mass"))
        options.check_choice("importance", self.importance, ("sampled", "means"))
        if self.share is not None and (
            type(self.share) is not int or self.share not in (1, 2, 4, 8, 16, 32, 64)
        ):
            raise ValueError(
                f"Expected no share or a power of two from 1 to 64, got share={self.share!r}. One "
                "in so many tokens of a block is sampled."
            )
        options.check_choice("norm", self.norm, ("softmax", "max"))
        options.check_choice("skipped", self.skipped, ("drop", "mean"))
        forced = options.check_planning(
            order=self.order,
            least=self.least,
            block=self.block,
            reuse_steps=self.reuse_steps,
            forced=self.forced,
        )
        object.__setattr__(self, "forced", forced)
        if self.causal and (self.order != "raster" or self.skipped == "mean"):
            raise ValueError(
                "Expected order='raster' and skipped='drop' for causal=True, got "
                f"order={self.order!r} and skipped={self.skipped!r}. The model's order says what "
                "is later, and one mean per skipped block would show what is."
            )

    def dense_reason(self, ctx: CallContext) -> str | None:
        return None

    def token_order(self, layout: TokenLayout, device: torch.device) -> Permutation | None:
        """See `dit_sparse.method.Ordered`."""
        return frame_of(layout, self.block, self.order, device=device).order

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        """The plan of a call.

        Raises:
            ValueError: ends that leave every block of this layout skipped, or text where causal.
        """
        frame = frame_of(ctx.layout, self.block, self.order, device=q.device)
        if ctx.ordered:
            frame = frame.in_order
        if self.causal and frame.has_context:
            raise ValueError(
                f"Expected a picture alone for causal=True, got {ctx.layout}. Leave causal out."
            )
        ranked = self.allocation == "quantile" and self.similarity is None
        importance = self._importance(q, k, ctx, frame, ranks=ranked)
        importance = self._candidates(importance, frame)
        ends = self._ends_on(frame)
        tail = self._tail
        if ranked and not self.forced and not self.causal:
            ranks = tuple(int(ends[g] * frame.candidates + 1e-9) for g in (1, *self._factors))
            return selection.plan_of_ranks(
                importance, frame, ranks, factors=self._factors, tail=tail
            )
        level = pyramid.levels(importance, ends, self.allocation, candidates=frame.candidates)
        if self.similarity is not None:
            keys = k if frame.order is None else frame.order(k)
            thresholds = dict(zip(_CAPS, self.similarity, strict=True))
            cap = pyramid.similarity_cap(keys, frame.blocks, thresholds)
            cap = cap.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            level = pyramid.capped(level, cap)
        forced = selection.forced_blocks(frame, self.forced)
        if forced is not None:
            level = level.masked_fill(forced, 1)
        if self.causal:
            return plan_of_causal_levels(level, frame.blocks, factors=self._factors)
        # Ranks give all rows the same levels; forced blocks are few.
        uneven = self.allocation != "quantile" or self.similarity is not None
        return selection.plan_of_selection(
            level, frame, factors=self._factors, tail=tail, uneven=uneven
        )

    @property
    def _tail(self) -> Tail:
        return "zeroth" if self.skipped == "mean" else "none"

    @property
    def _factors(self) -> tuple[int, ...]:
        """The pool factors that occur."""
        before = (0.0, *self.ends)
        used = {g for g, a, b in zip(_FACTORS, before, self.ends, strict=False) if b > a}
        if self.similarity is not None:  # a cap may move blocks to any finer level
            used = {g for g in _FACTORS if g <= max(used)}
        return tuple(sorted(used - {1}))

    def _importance(
        self, q: Tensor, k: Tensor, ctx: CallContext, frame: Frame, *, ranks: bool
    ) -> Tensor:
        """Importance of every pair of blocks; where it only `ranks` them, anything of its order."""
        if self.importance == "means":
            scores = selection.pooled_scores(q, k, frame, summaries=ctx.summaries, tail=self._tail)
            if ranks:
                # Finite, since -inf is never read; what is no number ranks last.
                return scores.nan_to_num_(torch.finfo(scores.dtype).min)
            return self._candidates(scores, frame).softmax(-1).nan_to_num(0.0)
        moment = (ctx.step or 0) * ctx.layers + ctx.layer
        seed = self.seed * 1_000_003 + 2 * moment
        share = self.share or (4 if frame.blocks.total <= _WELL_SAMPLED else 8)
        return sampled_importance(
            q, k, frame, share=share, norm=self.norm, seed=seed, causal=self.causal
        )

    def _candidates(self, scores: Tensor, frame: Frame) -> Tensor:
        """The scores with -inf for all blocks that are no matter of choice."""
        if self.causal:  # a block's own keys are read in any case
            scores = scores.masked_fill(~past(frame.blocks), -torch.inf)
        return selection.of_picture(scores, frame)

    def _ends_on(self, frame: Frame) -> dict[int, float]:
        """Ends by factor; the default ones read one block of a small picture, if no more."""
        ends = dict(zip(_FACTORS, self.ends, strict=True))
        if self.allocation == "mass":
            return ends
        least = max(self.least, int(self.ends == PsaMethod.ends))
        most = frame.candidates
        if least == 0 and int(self.ends[-1] * most + 1e-9) < 1:
            raise ValueError(
                f"Expected ends of at least {1 / most:.3g} for {most} key blocks of {self.block} "
                f"tokens, got {self.ends}. Raise the last end, take smaller blocks or set least."
            )
        if int(self.ends[-1] * most + 1e-9) >= least:
            return ends
        return {factor: max(end, min(1.0, least / most)) for factor, end in ends.items()}


def _ends(value: object) -> tuple[float, ...]:
    shares = isinstance(value, (tuple, list)) and len(value) == len(_FACTORS)
    if not shares or not all(options.is_number(end) for end in value):  # type: ignore[attr-defined]
        raise ValueError(
            f"Expected ends as four shares, for the levels 1, 2, 4 and 8, got {value!r}."
        )
    ends = tuple(map(float, value))  # type: ignore[call-overload]
    if not ends[0] >= 0.0 or not 0.0 < ends[-1] <= 1.0:
        raise ValueError(f"Expected ends from 0 to 1, the last one above 0, got {ends}.")
    if not all(a <= b for a, b in pairwise(ends)):  # NaN fails too
        raise ValueError(
            f"Expected ascending ends, got {ends}. Each is the share where its level ends, counted "
            "from the most important block."
        )
    return ends


def _similarity(value: object) -> tuple[float, ...]:
    shares = isinstance(value, (tuple, list)) and len(value) == len(_CAPS)
    if not shares or not all(
        options.is_number(t) and -1.0 <= t <= 1.0
        for t in value  # type: ignore[attr-defined]
    ):
        raise ValueError(
            "Expected similarity as three cosines from -1 to 1, for the levels 2, 4 and 8, "
            f"got {value!r}."
        )
    return tuple(map(float, value))  # type: ignore[call-overload]
