"""The plans of a session: made once for what they depend on, and a bounded number of them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dit_sparse.attention import Prepared, kind, prepare
from dit_sparse.backend import Precision
from dit_sparse.coarse import in_plan_order
from dit_sparse.grid import TokenLayout
from dit_sparse.hoist import TokenOrder, common_order
from dit_sparse.method import CallContext, Ordered, Segmented, SparseMethod
from dit_sparse.methods.schedule import Schedule
from dit_sparse.plan import BlockPlan
from dit_sparse.plan_reuse import PlanReuse, serves_again
from dit_sparse.summaries import Summaries

_KEPT_LAYOUTS = 8


@dataclass
class PlannedCall:
    """A plan, and what was found out about the calls that it served.

    Args:
        plan: what to compute.
        prepared: by kind of tensors, scale, name of the only backend and precision.
        used: whether it has served a call.
        once: whether it serves no other: then nothing is made ready for one.
        inside: the same for tensors that stand in the plan's order already, by that order.
    """

    plan: BlockPlan
    prepared: dict[Any, Prepared] = field(default_factory=dict)
    used: bool = False
    once: bool = False
    inside: dict[TokenOrder, PlannedCall | None] = field(default_factory=dict)

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        backend: str | None,
        precision: Precision = "bf16",
        summaries: Summaries | None = None,
    ) -> tuple[Tensor, Prepared]:
        """Attention values, and who computed them; see `dit_sparse.attend`.

        Args:
            summaries: of q, k and v, with what planning measured if the plan was made from them.
        """
        key = (scale, backend, precision, kind(q, k, v))
        known = self.prepared.get(key)
        if known is not None:
            return known.again(q, k, v).out, known
        output, known = prepare(
            *(q, k, v, self.plan),
            scale=scale,
            backend=backend,
            precision=precision,
            summaries=summaries,
            keep=not self.once,
        )
        # Where planning has measured, it is worth preparing the next call.
        if not self.once and (summaries is None or not summaries.measured):
            self.prepared[key] = known
        return output.out, known

    def within(self, order: TokenOrder) -> PlannedCall | None:
        """The call on tensors in this order, which need no permutation; `None` if the plan has
        another one."""
        if order not in self.inside:
            same = order.agrees(self.plan.order)
            self.inside[order] = PlannedCall(in_plan_order(self.plan)) if same else None
        return self.inside[order]


@dataclass
class _LayoutPlans:
    """Everything planned for a layout.

    Args:
        plans: by the method that plans the layer and, where it asks for that, the layer.
        by_layer: the same again by layer, which spares looking for the method and hashing it.
        segments: for methods that plan for some steps, the segment of each layer's plan.
        order: the order that all of them share, once it was asked for.
        starts: for methods that plan from q and k, whether they can begin in an order.
    """

    plans: dict[tuple[SparseMethod, int | None], PlannedCall] = field(default_factory=dict)
    by_layer: dict[int, PlannedCall] = field(default_factory=dict)
    segments: dict[tuple[SparseMethod, int | None], int] = field(default_factory=dict)
    order: TokenOrder | str | Literal[False] | None = False
    starts: dict[tuple[SparseMethod, TokenOrder], bool] = field(default_factory=dict)


class PlanCache:
    """Plans by layout, device, inference mode, method that serves the layer and, if it says so,
    the layer.

    The plans of the eight layouts used last are kept: enough for guidance with prompts of two
    lengths at a few resolutions.
    """

    def __init__(self, method: SparseMethod) -> None:
        self._method = method
        self._kept: OrderedDict[tuple[TokenLayout, torch.device, bool], _LayoutPlans]
        self._kept = OrderedDict()
        self._reuse = PlanReuse[PlannedCall]()
        self._latest: tuple[TokenLayout, tuple[torch.device, bool], _LayoutPlans] | None = None

    def begin_generation(self) -> None:
        """Forgets the plans that were made from q and k of another generation."""
        self._reuse.clear()

    def __len__(self) -> int:
        """Number of plans kept."""
        return sum(len(of.plans) for of in self._kept.values())

    def get(self, q: Tensor, k: Tensor, context: CallContext) -> PlannedCall:
        """The plan of a call on q, k `[B, H, N, D]`."""
        kept = self._of(context.layout, q.device)
        planned = kept.by_layer.get(context.layer)
        if planned is not None:
            return planned
        method = self._serving(context)
        if method.scope == "call":
            return self._reuse.get(method, q, context, lambda: _of_call(method, q, k, context))
        if method.scope == "segment":
            return _of_segment(kept, method, q, k, context)
        key = (method, context.layer if method.scope == "layer" else None)
        if key not in kept.plans:
            kept.plans[key] = _planned(method, q, k, context)
        kept.by_layer[context.layer] = kept.plans[key]
        return kept.plans[key]

    def order(self, q: Tensor, layout: TokenLayout, layers: int) -> TokenOrder | str | None:
        """The order that the plans of all layers share, before any layer has run.

        The answer is the same for all steps of a generation, so that what a cache keeps of one step
        has the order of the next; plans are made for it.

        Args:
            q: of the shape and on the device of the queries to come; its values are not read.
            layout: of the forward.
            layers: how many attention modules there are.

        Returns:
            The order; why there is none; `None` when nothing is reordered.
        """
        kept = self._of(layout, q.device)
        if kept.order is False:
            kept.order = self._common(q, [CallContext(layout, n, layers) for n in range(layers)])
        return kept.order

    def starts_from(self, order: TokenOrder, q: Tensor, context: CallContext) -> bool | None:
        """Whether the method that serves a call plans from q and k whose tokens stand in an order.

        Returns:
            `None` where it does not plan from q and k.
        """
        method = self._serving(context)
        if method.scope != "call":
            return None
        known = self._of(context.layout, q.device).starts
        if (method, order) not in known:
            own = None
            if isinstance(method, Ordered):
                own = method.token_order(context.layout, q.device)
            known[method, order] = order.agrees(own)
        return known[method, order]

    def _common(self, q: Tensor, contexts: list[CallContext]) -> TokenOrder | str | None:
        orders = []
        for context in contexts:
            method = self._serving(context)
            always = isinstance(self._method, Schedule) and self._method.always_dense(context)
            if always or method.dense_reason(context) is not None:
                continue
            if method.scope == "call" and isinstance(method, Ordered):
                orders.append(method.token_order(context.layout, q.device))
                continue
            if method.scope != "layout":
                what = "q and k" if method.scope == "call" else "each layer"
                return f"method {method.name} plans from {what}"
            orders.append(self.get(q, q, context).plan.order)
        return common_order(orders, contexts[0].layout)

    def _serving(self, context: CallContext) -> SparseMethod:
        return self._method.at(context) if isinstance(self._method, Schedule) else self._method

    def _of(self, layout: TokenLayout, device: torch.device) -> _LayoutPlans:
        """The plans for a layout."""
        # What backends compute from a plan stays with it, and autograd refuses tensors that were
        # made in inference mode: training has plans of its own.
        place = (device, torch.is_inference_mode_enabled())
        latest = self._latest  # all layers of a forward ask with the same object: spare the hash
        if latest is not None and latest[0] is layout and latest[1] == place:
            return latest[2]
        kept = self._kept.setdefault((layout, *place), _LayoutPlans())
        self._kept.move_to_end((layout, *place))
        if len(self._kept) > _KEPT_LAYOUTS:
            self._kept.popitem(last=False)
        self._latest = (layout, place, kept)
        return kept


def _of_segment(
    kept: _LayoutPlans, method: SparseMethod, q: Tensor, k: Tensor, context: CallContext
) -> PlannedCall:
    """The plan of a layer for the segment of the step; it takes the place of the one before."""
    assert isinstance(method, Segmented)  # what the scope says
    key, segment = (method, context.layer), method.segment(context)
    if kept.segments.get(key) != segment:
        kept.plans[key] = _planned(method, q, k, context)
        kept.segments[key] = segment
    return kept.plans[key]


def _of_call(method: SparseMethod, q: Tensor, k: Tensor, context: CallContext) -> PlannedCall:
    planned = _planned(method, q, k, context)
    planned.once = not serves_again(method)
    return planned


@torch.inference_mode(False)  # a method may remember tensors for its next plan
@torch.no_grad()
def _planned(method: SparseMethod, q: Tensor, k: Tensor, context: CallContext) -> PlannedCall:
    return PlannedCall(method.plan(q, k, context))
