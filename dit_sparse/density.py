"""How many rows of keys a plan reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from dit_sparse.plan import BlockPlan


def keys_read(plan: BlockPlan) -> Tensor:
    """int64 `[1 or B, 1 or H, n_q]`: rows of keys, pooled ones too, that a query block reads."""
    lengths = plan.k_blocks.lengths.long()
    blocks, start = plan.indices.long(), plan.offsets.long()

    def read(keys: Tensor, first: Tensor, count: Tensor) -> Tensor:
        before = F.pad(keys[blocks].cumsum(0), (1, 0))  # keys in all entries before this one
        return before[first + count] - before[first]

    total = read(lengths, start, plan.full + plan.partial)
    start = start + plan.full + plan.partial
    if plan.pools is not None:
        for factor, count in zip(plan.pools.factors, plan.pools.counts.unbind(-1), strict=True):
            total = total + read((lengths + factor - 1) // factor, start, count)
            start = start + count
    if plan.tail == "none":
        return total
    hidden = 0 if plan.hidden is None else plan.hidden.sum(-1)[:, None, None]
    return total + plan.k_blocks.n - hidden - plan.count
