"""One order for a whole forward: tokens are put into it at the model's entry, not in every layer.

All that happens to tokens between attention calls happens to each alone, so that a model computes
the same in any order, if the tokens and whatever belongs to them by position (rotary embeddings,
time steps per token) are permuted together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.grid import Permutation, TokenLayout
from dit_sparse.orders import lift


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """A permutation of the picture's tokens that leaves all other tokens where they are.

    Args:
        by_length: the permutation of every sequence with these tokens, by its length: the joint
            sequence, and the images alone.
    """

    by_length: Mapping[int, Permutation]

    @staticmethod
    def of(order: Permutation, layout: TokenLayout) -> TokenOrder | str:
        """The order of a plan for `layout`, or why it is none; waits for the device."""
        if order.index.ndim != 1:
            return "its order differs between heads"
        start = layout.grid_start
        picture = Permutation(order.index[start : start + layout.grid.length] - start)
        if not torch.equal(lift(picture, layout).index, order.index):
            return "its order moves tokens of text or reference images"
        alone = layout.without_text()
        return TokenOrder({layout.length: order, alone.length: lift(picture, alone)})

    def agrees(self, order: Permutation | None) -> bool:
        """Whether a plan has this order; waits for the device."""
        if order is None or order.index.ndim != 1:
            return False
        own = self.by_length.get(order.length)
        return own is not None and torch.equal(own.index, order.index.to(own.index.device))

    def put(self, x: Tensor, axis: int) -> Tensor:
        """`x` in this order along an axis as long as one of the sequences."""
        return x.index_select(axis, self._on(x, axis).index)

    def undo(self, x: Tensor, axis: int) -> Tensor:
        """`x` out of this order."""
        return x.index_select(axis, self._on(x, axis).inverse)

    def _on(self, x: Tensor, axis: int) -> Permutation:
        if x.shape[axis] not in self.by_length:
            raise RuntimeError(
                f"Expected {' or '.join(map(str, self.by_length))} tokens along dimension {axis} "
                f"of {list(x.shape)}, which is to be put into the order of the plans. Pass "
                "hoist=False to dit_sparse.apply()."
            )
        return self.by_length[x.shape[axis]].to(x.device)


def common_order(
    orders: Iterable[Permutation | None], layout: TokenLayout
) -> TokenOrder | str | None:
    """The order that all plans of a forward share.

    Args:
        orders: those of the plans for `layout`.

    Returns:
        The order; a reason why there is none; `None` when the plans do not reorder.
    """
    distinct = list(dict.fromkeys(orders))
    if not distinct or distinct == [None]:
        return None
    if None in distinct:
        return "some plans reorder and some do not"
    first, *rest = (order for order in distinct if order is not None)
    common = TokenOrder.of(first, layout)
    if isinstance(common, TokenOrder) and not all(map(common.agrees, rest)):
        return "the plans of its layers differ in their order"
    return common


class TokenFlow:
    """Where the tokens of the running forward are: in the model's order or in that of the plans.

    The places where tokens enter (gates) are numbered; every one of them is passed before the first
    attention call, and tokens leave once, behind the last.
    """

    def __init__(self) -> None:
        self.order: TokenOrder | None = None
        self._awaited: set[int] = set()

    def start(self, order: TokenOrder | None, gates: Collection[int] = ()) -> None:
        """A forward begins, whose tokens are put into `order` at these gates."""
        self.order = order
        self._awaited = set(gates)

    def enter(self, gate: int) -> TokenOrder | None:
        """The order to put tokens into that pass an entrance."""
        self._awaited.discard(gate)
        return self.order

    def leave(self) -> TokenOrder | None:
        """The order to take tokens out of that leave; from here on they are in the model's."""
        order, self.order = self.order, None
        return order

    def inside(self) -> TokenOrder | None:
        """The order in which tokens stand in an attention call.

        Raises:
            RuntimeError: some have not been put into it.
        """
        if self.order is not None and self._awaited:
            raise RuntimeError(_BYPASSED)
        return self.order

    def end(self) -> None:
        """The forward has ended.

        Raises:
            RuntimeError: its result is still in the order of the plans.
        """
        if self.leave() is not None:
            raise RuntimeError(_BYPASSED)


_BYPASSED = (
    "Expected the forward to pass the modules where its tokens are put into the order of the plans "
    "and back, got one that did not. Compile the transformer after the method is applied, or pass "
    "hoist=False to dit_sparse.apply()."
)
