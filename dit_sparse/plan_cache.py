"""The plans of a session: made once for what they depend on, and a bounded number of them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dit_sparse.attention import select_backend
from dit_sparse.backend import Backend
from dit_sparse.grid import TokenLayout
from dit_sparse.method import CallContext, SparseMethod
from dit_sparse.methods.schedule import Schedule
from dit_sparse.plan import BlockPlan

_KEPT_LAYOUTS = 8


@dataclass
class PlannedCall:
    """A plan and the backend chosen for each kind of tensors that it met.

    Args:
        plan: what to compute.
        choices: by shapes, strides and dtype of the call: the backend and the refusals of those
            preferred to it.
    """

    plan: BlockPlan
    choices: dict[Any, tuple[Backend, tuple[str, ...]]] = field(default_factory=dict)

    def backend(
        self, q: Tensor, k: Tensor, v: Tensor, name: str | None
    ) -> tuple[Backend, tuple[str, ...]]:
        """The backend for a call and the refusals of those before it; see `select_backend`."""
        grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
        kind = (q.dtype, q.shape, q.stride(), k.stride(), v.stride(), v.shape, grad)
        if kind not in self.choices:
            self.choices[kind] = select_backend(q, k, v, self.plan, name)
        return self.choices[kind]


#: by the method that plans the layer and, where it asks for that, the layer
_Plans: TypeAlias = dict[tuple[SparseMethod, int | None], PlannedCall]


class PlanCache:
    """Plans by layout, device, inference mode, method that serves the layer and, if it says so,
    the layer.

    The plans of the eight layouts used last are kept: enough for guidance with prompts of two
    lengths at a few resolutions.
    """

    def __init__(self, method: SparseMethod) -> None:
        self._method = method
        self._plans: OrderedDict[tuple[TokenLayout, torch.device, bool], _Plans] = OrderedDict()
        self._latest: tuple[TokenLayout, tuple[torch.device, bool], _Plans] | None = None

    def __len__(self) -> int:
        """Number of plans kept."""
        return sum(map(len, self._plans.values()))

    def get(self, q: Tensor, k: Tensor, context: CallContext) -> PlannedCall:
        """The plan of a call on q, k `[B, H, N, D]`."""
        method = self._method.at(context) if isinstance(self._method, Schedule) else self._method
        if method.scope == "call":
            return _planned(method, q, k, context)
        plans = self._of(context.layout, q.device)
        key = (method, context.layer if method.scope == "layer" else None)
        if key not in plans:
            plans[key] = _planned(method, q, k, context)
        return plans[key]

    def _of(self, layout: TokenLayout, device: torch.device) -> _Plans:
        """The plans for a layout."""
        # What backends compute from a plan stays with it, and autograd refuses tensors that were
        # made in inference mode: training has plans of its own.
        place = (device, torch.is_inference_mode_enabled())
        latest = self._latest  # all layers of a forward ask with the same object: spare the hash
        if latest is not None and latest[0] is layout and latest[1] == place:
            return latest[2]
        plans = self._plans.setdefault((layout, *place), {})
        self._plans.move_to_end((layout, *place))
        if len(self._plans) > _KEPT_LAYOUTS:
            self._plans.popitem(last=False)
        self._latest = (layout, place, plans)
        return plans


@torch.inference_mode(False)  # a method may remember tensors for its next plan
@torch.no_grad()
def _planned(method: SparseMethod, q: Tensor, k: Tensor, context: CallContext) -> PlannedCall:
    return PlannedCall(method.plan(q, k, context))
