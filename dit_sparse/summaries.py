"""What the planning of a call measures of q, k and v, and its attention need not measure again.

A plan may be kept and serve other calls, so it carries none of this: a bound of the scores or means
of other tensors would be wrong without a word. `Summaries` is made for one call, by those who plan
it and run the plan at once (`attention.plan_and_attend`, a session), and ends with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from dit_sparse.backend import BlockSummaries, kernel_module
from dit_sparse.frame import Frame
from dit_sparse.plan import BlockPlan, Blocks


@dataclass(eq=False)
class Summaries:
    """What is known of the tensors of one call, which it holds: nothing else is ever described.

    Nobody may write to them until the call ends.

    Args:
        q, k, v: `[B, H, N, D]`, as `method.plan` and then the backend get them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    _known: tuple[Blocks, Tensor | None, BlockSummaries] | None = field(default=None, init=False)

    def measure(self, q: Tensor, k: Tensor, frame: Frame, *, values: bool) -> BlockSummaries | None:
        """Measures the call's tensors, for planning and for `of`.

        Args:
            q, k: what is planned from.
            frame: its blocks, and those that are hidden.
            values: whether the plan has a tail, which takes means of v.

        Returns:
            `None`, and nothing measured, for tensors that are not those of the call or not in the
            order of the blocks, or where attention would measure again.
        """
        if q is not self.q or k is not self.k or frame.order is not None:
            return None
        kernels = kernel_module("summaries")
        if kernels is None or not kernels.worth(q, k, self.v, frame.blocks):
            return None
        found: BlockSummaries = kernels.measure(
            q, k, self.v, frame.blocks, frame.hidden, values=values
        )
        self._known = (frame.blocks, frame.hidden, found)
        return found

    def of(self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> BlockSummaries | None:
        """What was measured of these tensors, in the blocks of a plan; measures nothing."""
        if self._known is None or q is not self.q or k is not self.k or v is not self.v:
            return None
        blocks, hidden, found = self._known
        same = plan.q_blocks is blocks and plan.k_blocks is blocks and plan.hidden is hidden
        enough = plan.tail == "none" or found.means is not None
        return found if same and enough and plan.order is None and plan.coarse is None else None

    def keys(self, k: Tensor, frame: Frame) -> Tensor | None:
        """Means of the blocks of k in fp32, see `BlockSummaries`, if they were measured."""
        if self._known is None or k is not self.k or frame.order is not None:
            return None
        blocks, _, found = self._known
        return found.keys if frame.blocks is blocks else None

    @property
    def measured(self) -> bool:
        """Whether planning has measured anything."""
        return self._known is not None
