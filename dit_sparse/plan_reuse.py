"""When a plan made from q and k serves other calls: later steps, other guidance branches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from dit_sparse.method import CallContext

T = TypeVar("T")


@runtime_checkable
class Reusing(Protocol):
    """A method whose plans may serve more than the call that they were made for."""

    @property
    def reuse_steps(self) -> int:
        """Denoising steps that a plan serves, the one that it was made in among them."""
        ...

    @property
    def share_branches(self) -> bool:
        """Whether all forwards of a step use the plan of the first."""
        ...


def serves_again(method: object) -> bool:
    """Whether a plan that a method made from q and k may serve other calls than its own."""
    return isinstance(method, Reusing) and (method.reuse_steps > 1 or method.share_branches)


class PlanReuse(Generic[T]):
    """The plans of a generation that may serve again, by layer, layout and guidance branch.

    The forwards of a step are its branches, told apart by their number.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[int, T]] = {}
        self._branches = Counter[Hashable]()
        self._step: int | None = None

    def clear(self) -> None:
        """Forgets everything: another generation begins."""
        self._kept.clear()
        self._branches.clear()
        self._step = None

    def get(self, method: object, q: Tensor, context: CallContext, make: Callable[[], T]) -> T:
        """The plan kept for a call, or a new one.

        Raises:
            ValueError: plans are to be reused, and the step is not known.
        """
        if not serves_again(method):
            return make()
        assert isinstance(method, Reusing)  # what that says
        if context.step is None:
            raise ValueError(
                "Expected to know the denoising step for reuse_steps or share_branches, got a "
                "forward outside a pipeline. Apply the method to the pipeline, or pass steps=."
            )
        if context.step != self._step:
            self._step = context.step
            self._branches.clear()
        # Autograd refuses tensors that were made in inference mode.
        place = (q.shape, q.device, torch.is_inference_mode_enabled(), context.ordered)
        call = (method, context.layer, context.layout, place)
        branch = 0 if method.share_branches else self._branches[call]
        self._branches[call] += 1
        made, plan = self._kept.get((call, branch), (None, None))
        if plan is None or made is None or not 0 <= context.step - made < method.reuse_steps:
            plan = make()
            self._kept[call, branch] = (context.step, plan)
        return plan
