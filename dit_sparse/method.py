"""What a sparse attention method is: a frozen record that turns a call into a plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from dit_sparse.grid import Permutation, TokenLayout
from dit_sparse.plan import BlockPlan
from dit_sparse.summaries import Summaries

PlanScope = Literal["layout", "layer", "segment", "call"]


@dataclass(frozen=True)
class CallContext:
    """Everything a method may know about one attention call besides q, k and v.

    Args:
        layout: the sequence of this call.
        layer: number of the self-attention module in the transformer, counted from 0.
        layers: how many there are.
        step: number of the denoising step, counted from 0; `None` when it cannot be known.
        steps: how many steps the generation takes; `None` when it cannot be known.
        values: v `[B, H, N, D_v]` of the call, where it is known.
        ordered: whether the tokens of q, k and v stand in the order of the method, which is
            `Ordered`. The plan then begins with them as they are.
        summaries: of the call, where its plan is going to run on the same tensors at once: what
            planning measures of them is not measured again.
    """

    layout: TokenLayout
    layer: int = 0
    layers: int = 1
    step: int | None = None
    steps: int | None = None
    values: Tensor | None = field(default=None, repr=False, compare=False)
    ordered: bool = False
    summaries: Summaries | None = field(default=None, repr=False, compare=False)


@runtime_checkable
class SparseMethod(Protocol):
    """A method is data: order, selection and correction, put into a plan.

    Implementations are frozen dataclasses, one per file of `dit_sparse/methods/`; their fields are
    the options that `pipe.set_attn_processor(name, options={...})` and the CLI offer.
    """

    @property
    def name(self) -> str: ...

    @property
    def scope(self) -> PlanScope:
        """How far a plan carries.

        `"layout"` plans depend on the layout alone and are made once for it, `"layer"` plans once
        per layer, `"segment"` plans once per layer and segment of the denoising steps (then the
        method is `Segmented`), `"call"` plans are made anew from q and k. A `"layout"` plan may be
        asked for before the forward, with q and k that have a shape and a device but no values.
        """
        ...

    def dense_reason(self, ctx: CallContext) -> str | None:
        """A sentence why this call runs dense attention, or `None` when it has a plan."""
        ...

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        """The plan of a call, on the device of `q`.

        Args:
            q, k: `[B, H, N, D]` in the model's order, unless `ctx.ordered`, after norms and
                position embedding.
        """
        ...


@runtime_checkable
class Ordered(Protocol):
    """A method that plans from q and k, in an order that depends on the layout alone."""

    def token_order(self, layout: TokenLayout, device: torch.device) -> Permutation | None:
        """From the model's order to that of the method's plans; `None`: they are the same."""
        ...


@runtime_checkable
class Segmented(Protocol):
    """A method whose plans hold for some denoising steps."""

    def segment(self, ctx: CallContext) -> int:
        """The number of the segment of the call's step; of a layer, the plan of the latest segment
        alone is kept."""
        ...
