"""Queries, keys and values of chosen attention calls of a real run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

import dit_sparse
from dit_sparse.grid import TextSpan, TokenLayout
from dit_sparse.method import CallContext, PlanScope
from dit_sparse.methods.window import WindowMethod
from dit_sparse.plan import BlockPlan
from scripts.evaluation.model import Model


@dataclass(frozen=True, eq=False)
class Capture:
    """What one attention call read.

    Attributes:
        layer, step: numbers of the attention module and of the denoising step, from 0.
        layout: the sequence.
        q, k: `[H, N, D]` of the first batch entry, after norms and position embedding.
        v: its values, if they were kept.
    """

    layer: int
    step: int
    layout: TokenLayout
    q: Tensor
    k: Tensor
    v: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v `[1, H, N, D]` of a call whose values were kept.

        Raises:
            ValueError: they were not.
        """
        if self.v is None:
            raise ValueError(
                "Expected a call whose values were kept, got one without. Probe it again."
            )
        return self.q[None], self.k[None], self.v[None]

    @property
    def context(self) -> CallContext:
        """The context of a call on the first batch entry alone."""
        segments = tuple(
            replace(s, valid=s.valid[:1]) if isinstance(s, TextSpan) and s.valid is not None else s
            for s in self.layout.segments
        )
        values = None if self.v is None else self.v[None]
        layout = TokenLayout(segments)
        return CallContext(layout, layer=self.layer, step=self.step, values=values)


@dataclass(frozen=True, eq=False)
class AttentionProbe:
    """A method that keeps q, k and v of chosen calls and changes nothing.

    A chosen call runs a plan that reads every key; all others are dense. Of the forwards of a step
    the first is kept, which is the prompt's where guidance takes two.

    Args:
        layers, steps: numbers of the layers and denoising steps that are kept.
    """

    layers: frozenset[int]
    steps: frozenset[int]
    captures: dict[tuple[int, int], Capture] = field(default_factory=dict)

    name: ClassVar[str] = "probe"
    scope: ClassVar[PlanScope] = "call"

    def dense_reason(self, ctx: CallContext) -> str | None:
        chosen = ctx.layer in self.layers and ctx.step in self.steps
        if not chosen or (ctx.layer, ctx.step) in self.captures:
            return "the call is not probed"
        return None

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        assert ctx.step is not None  # dense_reason let the call through
        assert ctx.values is not None  # a session always gives them
        kept = (tensor[0].clone() for tensor in (q, k, ctx.values))
        self.captures[ctx.layer, ctx.step] = Capture(ctx.layer, ctx.step, ctx.layout, *kept)
        return WindowMethod(density=1.0).plan(q, k, ctx)


def layers_of(model: Model) -> int:
    """How many self-attention modules the model's transformer has."""
    dit_sparse.apply(model.pipe, "dense")
    rows = dit_sparse.summary(model.pipe).rows
    dit_sparse.remove(model.pipe)
    return len(rows)


def capture(
    model: Model, prompt: str, layers: Sequence[int], steps: Sequence[int]
) -> tuple[Capture, ...]:
    """Runs one prompt and returns the calls of the layers at the steps, layer by layer.

    Raises:
        ValueError: a layer or a step that the run does not have.
    """
    probe = AttentionProbe(frozenset(layers), frozenset(steps))
    dit_sparse.apply(model.pipe, probe)
    try:
        list(model.sample([prompt]))
    finally:
        dit_sparse.remove(model.pipe)
    wanted = [(layer, step) for layer in layers for step in steps]
    missing = [pair for pair in wanted if pair not in probe.captures]
    if missing:
        raise ValueError(
            f"Expected the run to have the layers {list(layers)} at the steps {list(steps)}, got "
            f"none at (layer, step) {missing[0]}. Name others."
        )
    return tuple(probe.captures[pair] for pair in wanted)
