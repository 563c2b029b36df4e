"""The order in which a launch begins its query blocks: those with long lists first.

A block with a long list that is begun last runs on alone. Exactly sorted they need not be: buckets
of a quarter of a factor of 2 are enough, and leave the blocks of a head beside each other, which
read the same keys. `scripts/launch_orders.py` simulates what it is worth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels._longest_first import _longest_first_fwd
from dit_sparse.plan import BlockPlan

#: Of lists that are no shorter than 1/256 of the keys; all others share the last one.
BUCKETS = 32
_ROWS, _CHUNK = 128, 2048  # tiles that a program puts in place, and that it counts at a time


def longest_first(plan: BlockPlan, batch: int, heads: int) -> Tensor | None:
    """int32 `[batch * heads * n_q]`: tiles `(batch, head, query block)`, counted with the block
    last, in the order to begin them; `None` where one order is as good as the other.

    Made in one launch, which waits for nothing, and kept with the plan.
    """
    if not plan.uneven:
        return None
    known: dict[tuple[int, int], Tensor] = vars(plan).setdefault("_longest_first", {})
    if (batch, heads) not in known:
        known[batch, heads] = _made(plan, batch, heads)
    return known[batch, heads]


def _made(plan: BlockPlan, batch: int, heads: int) -> Tensor:
    tiles = batch * heads * plan.q_blocks.n
    queue = torch.empty(tiles, dtype=torch.int32, device=plan.device)
    _longest_first_fwd[(-(-tiles // _ROWS),)](
        plan.full, plan.partial, queue, *plan.full.expand(batch, heads, -1).stride()[:2],
        heads, plan.q_blocks.n, plan.k_blocks.n, tiles,
        BUCKETS=BUCKETS, ROWS=_ROWS, CHUNK=_CHUNK, num_warps=8,
    )  # fmt: skip
    return queue
