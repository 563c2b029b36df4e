"""PAROAttention: the order that suits each head, and block masks that were found beforehand.

Calibration (`dit_sparse.calibrate`) finds for every head the axis order that makes blocks of its
pattern, and for every segment of the steps the blocks that hold its mass (PARO, arXiv 2506.16054).
Nothing is decided while a picture is made. The softmax goes over the blocks that are kept, as in
the paper's kernel; its simulator does not renormalise. Blocks begin at the picture's first token
and text is read exactly by all, where the public code puts blocks across the two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dit_sparse import options, orders, selection
from dit_sparse.calibration import Calibration
from dit_sparse.frame import Frame, frame_of
from dit_sparse.grid import Permutation, TokenLayout
from dit_sparse.mask_feed import MaskFeed
from dit_sparse.method import CallContext, PlanScope
from dit_sparse.model_identity import ModelIdentity
from dit_sparse.plan import BlockPlan


@dataclass(frozen=True)
class ParoMethod:
    """PARO: static orders and masks of a calibration.

    Args:
        path: folder or Hub repository of the calibration; see `dit-sparse calibrate`.
        tail: what stands for the blocks that are not read: nothing (none, the paper), or their mean
            key and value (zeroth, from PISA).

    Raises:
        ValueError: no whole calibration is there, or an unknown tail.
    """

    path: str
    tail: Literal["none", "zeroth"] = "none"

    name: ClassVar[str] = "paro"
    scope: ClassVar[PlanScope] = "segment"

    def __post_init__(self) -> None:
        options.check_choice("tail", self.tail, ("none", "zeroth"))
        _ = self.calibration  # what cannot be read is refused now, not in the first forward

    @cached_property
    def calibration(self) -> Calibration:
        return Calibration.from_pretrained(self.path)

    @cached_property
    def _feeds(self) -> dict[torch.device, MaskFeed]:
        return {}

    def dense_reason(self, ctx: CallContext) -> str | None:
        return None

    def check_model(self, model: ModelIdentity) -> None:
        """Refuses a model of another class or configuration than the calibrated one.

        Raises:
            ValueError: it is another.
        """
        if not self.calibration.model.agrees(model):
            raise ValueError(
                f"Expected the model of the calibration in {self.path!r}, "
                f"{self.calibration.model}, got {model}. Calibrate this model."
            )

    def segment(self, ctx: CallContext) -> int:
        """The segment of the call's step; plans hold for all its steps.

        Raises:
            ValueError: the step is not known, or there are more or fewer than at calibration.
        """
        segments = self.calibration.segments
        if ctx.step is None or ctx.steps is None:
            raise ValueError(
                "Expected to know the denoising step and their number for PARO, got a forward "
                "outside a pipeline. Apply the method to the pipeline, or pass steps=."
            )
        if ctx.steps != len(segments) or not 0 <= ctx.step < ctx.steps:
            raise ValueError(
                f"Expected the {len(segments)} denoising steps of the calibration in "
                f"{self.path!r}, got step {ctx.step} of {ctx.steps}. Take that many steps, or "
                "calibrate for others."
            )
        return segments[ctx.step]

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        """The plan of a layer in a segment of the steps; of q, only heads and device are read.

        Raises:
            ValueError: another grid, number of layers, heads or steps than at calibration.
        """
        frame = self.frame(q, ctx)
        levels = self.levels(frame, q, ctx)
        total = self._entries(frame, ctx)
        return selection.plan_of_selection(
            levels, frame, total=total, tail=self.tail, uneven=True, lasting=True
        )

    def _entries(self, frame: Frame, ctx: CallContext) -> int:
        """How many entries the lists of a call have: those of the mask, and text's."""
        known, n, picture = self.calibration, frame.blocks.n, frame.candidates
        of_masks = known.entries(self.segment(ctx), ctx.layer)
        hidden = frame_of(ctx.layout, known.block).hidden  # on the host
        counts = [0] if hidden is None else hidden.sum(1).tolist()
        text = sum((n - picture) * (n - out) + picture * (n - picture - out) for out in counts)
        return of_masks * len(counts) + text * known.heads

    def frame(self, q: Tensor, ctx: CallContext) -> Frame:
        """Blocks of a call, in the order of each head; raises what `plan` does."""
        self._check_call(q, ctx)
        frame = frame_of(ctx.layout, self.calibration.block, device=q.device)
        return replace(frame, order=self._order(ctx.layout, ctx.layer, q.device))

    def levels(self, frame: Frame, q: Tensor, ctx: CallContext) -> Tensor:
        """uint8 `[1, H, n, n]`: 1 for the picture's blocks that the mask of the call reads."""
        if q.device not in self._feeds:
            self._feeds[q.device] = MaskFeed(self.calibration, q.device)
        mask = self._feeds[q.device].take(self.segment(ctx), ctx.layer)
        n, picture = frame.blocks.n, frame.blocks.picture
        assert picture is not None  # a frame's blocks say where it is
        level = torch.zeros(1, len(mask), n, n, dtype=torch.uint8, device=q.device)
        within = slice(picture.start, picture.stop)
        level[:, :, within, within] = mask
        return level

    def _order(self, layout: TokenLayout, layer: int, device: torch.device) -> Permutation | None:
        """Orders of the heads, one for all where they agree; `None` for raster order."""
        given = self.calibration.order_names(layer)
        names = [orders.plain_axes(layout.grid, name) for name in given]
        if {*names} == {orders.AXES[0]}:
            return None
        found = {name: orders.axes(layout.grid, name, device=device) for name in {*names}}
        if len(found) == 1:
            return orders.lift(found[names[0]], layout)
        index = torch.stack([found[name].index for name in names])
        return orders.lift(Permutation(index), layout)

    def _check_call(self, q: Tensor, ctx: CallContext) -> None:
        known = self.calibration
        if ctx.layout.grid != known.grid:
            raise ValueError(
                f"Expected the grid of the calibration in {self.path!r}, {known.grid} tokens, got "
                f"{ctx.layout.grid}. Use the height, width and frames of the calibration, or "
                "calibrate for these."
            )
        if (ctx.layers, q.shape[1]) != (known.layers, known.heads):
            raise ValueError(
                f"Expected a model with {known.layers} attention layers of {known.heads} heads, as "
                f"the calibration in {self.path!r} has, got {ctx.layers} layers and "
                f"{q.shape[1]} heads. Calibrate this model."
            )
