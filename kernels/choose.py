"""Plans from scores of block pairs, in one launch and without waiting for the device."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dit_sparse.frame import Frame
from dit_sparse.kernels._choose import _choose_fwd
from dit_sparse.kernels.launch import device_of
from dit_sparse.list_lengths import check_entries
from dit_sparse.plan import BlockPlan, Pools, Tail

#: Key blocks of a row that a program holds in registers.
WIDEST = 4096
# With 256 blocks one warp takes 0.10 ms for 3,072 rows, and four, which wait for each other, 0.19
# [H200].
_BLOCKS_OF_A_WARP = 256


def choose(
    scores: Tensor,
    frame: Frame,
    ends: tuple[int, ...],
    *,
    factors: tuple[int, ...] = (),
    mass: float | None = None,
    tail: Tail = "none",
) -> BlockPlan:
    """The plan that reads the picture's blocks by rank of score, and text by all.

    Args:
        scores: fp32 `[B, H, n, n]`; -inf is never read.
        ends: how many blocks are exact, and then up to which rank each pool factor goes.
        factors: the pool factors, ascending; one fewer than ends.
        mass: instead of ends, which is then the room alone: exact blocks until they hold this share
            of the softmax over the row.
        tail: the plan's field of this name.

    Raises:
        ValueError: more entries than 32 bits number.
    """
    batch, heads, n, _ = scores.shape
    scores = scores.contiguous()
    room = n if frame.has_context or mass is not None else max(1, ends[-1])
    entries, rows = (batch * heads * n * room,), (batch, heads, n)
    check_entries(entries[0])  # offsets would be those of other rows
    # One by one: Triton compiles anew for addresses that are no multiples of 16.
    indices, first_keys, n_keys = (scores.new_empty(entries, dtype=torch.int32) for _ in range(3))
    offsets, full, partial = (scores.new_empty(rows, dtype=torch.int32) for _ in range(3))
    pooled = scores.new_empty(batch, heads, n, len(factors), dtype=torch.int32)
    visited = scores.new_empty((batch, heads, n, n) if tail != "none" else (0,), dtype=torch.bool)
    hidden = frame.hidden
    width = triton.next_power_of_2(n)
    with device_of(scores):
        _choose_fwd[(batch * heads * n,)](
            scores, frame.context.view(torch.uint8),
            scores if hidden is None else hidden.view(torch.uint8), frame.blocks.starts,
            indices, first_keys, n_keys, offsets, full, partial, pooled, visited.view(torch.uint8),
            n if hidden is not None and hidden.shape[0] > 1 else 0, heads * n, n, room,
            *(*ends, 0, 0, 0)[:4], mass or 0.0,
            WIDTH=width, N_LEVELS=1 + len(factors), BY_MASS=mass is not None,
            HAS_HIDDEN=hidden is not None, VISITED=tail != "none",
            num_warps=min(max(width // _BLOCKS_OF_A_WARP, 1), 8),
        )  # fmt: skip
    plan = BlockPlan(
        q_blocks=frame.blocks,
        k_blocks=frame.blocks,
        indices=indices,
        offsets=offsets,
        full=full,
        partial=partial,
        pools=Pools(factors, pooled) if factors else None,
        tail=tail,
        hidden=hidden,
        order=frame.order,
        uneven=mass is not None,
    )
    # Known here: getting them from the lists takes more launches, or waits for the device.
    vars(plan)["spans"] = (first_keys, n_keys)
    if tail != "none":
        vars(plan)["visited"] = visited
    return plan
