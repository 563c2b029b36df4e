"""The order in which a launch begins its query blocks: those with long lists first.

A block with a long list that is begun last runs on alone. Exactly sorted they need not be: buckets
of a quarter of a factor of 2 are enough, and leave the blocks of a head beside each other, which
read the same keys. `scripts/launch_orders.py` simulates what it is worth.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dit_sparse.kernels._longest_first import _longest_first_fwd
from dit_sparse.plan import BlockPlan

#: Which entries a launch reads: partial ones have a launch of their own in some kernels, for the
#: query blocks alone that have any.
Part = Literal["all", "full", "partial"]

#: Of lists that are no shorter than 1/256 of the keys; all others share the last one.
BUCKETS = 32
_ROWS, _CHUNK = 128, 2048  # tiles that a program puts in place, and that it counts at a time


def longest_first(plan: BlockPlan, batch: int, heads: int, part: Part = "all") -> Tensor | None:
    """int32 `[batch * heads * n]`: tiles `(batch, head, row)`, counted with the row last, in the
    order to begin them; `None` where one order is as good as the other. See `queue_of`."""
    return queue_of(plan, batch, heads, part) if plan.uneven else None


def queue_of(plan: BlockPlan, batch: int, heads: int, part: Part = "all") -> Tensor:
    """`longest_first` of any plan.

    Made in one launch, which waits for nothing, and kept with the plan.

    Args:
        part: what counts as the length of a row. Rows are query blocks, or for `"partial"` those of
            `plan.masked_rows`, which waits for the device.
    """
    known: dict[tuple[int, int, Part], Tensor] = vars(plan).setdefault("_longest_first", {})
    key = (batch, heads, part)
    if key not in known:
        known[key] = _made(plan, batch, heads, part)
    return known[key]


def _made(plan: BlockPlan, batch: int, heads: int, part: Part) -> Tensor:
    lists = plan.full
    if part == "partial":
        lists = plan.partial[..., plan.masked_rows.long()].contiguous()
    n_rows = lists.shape[-1]
    tiles = batch * heads * n_rows
    queue = torch.empty(tiles, dtype=torch.int32, device=plan.device)
    _longest_first_fwd[(-(-tiles // _ROWS),)](
        lists, plan.partial, queue, *lists.expand(batch, heads, -1).stride()[:2],
        heads, n_rows, plan.k_blocks.n, tiles,
        BUCKETS=BUCKETS, ROWS=_ROWS, CHUNK=_CHUNK, BOTH=part == "all", num_warps=8,
    )  # fmt: skip
    return queue
