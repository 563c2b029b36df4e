"""Plans from a level for every pair of blocks: skipped, exact, or pooled by a factor."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.grid import Permutation
from dit_sparse.plan import BlockPlan, Blocks, Pools, Tail


def plan_of_levels(
    level: Tensor,
    q_blocks: Blocks,
    k_blocks: Blocks,
    *,
    factors: tuple[int, ...] = (),
    room: int | None = None,
    tail: Tail = "none",
    hidden: Tensor | None = None,
    order: Permutation | None = None,
) -> BlockPlan:
    """The plan that reads every key block at its level.

    Args:
        level: uint8 `[1 or B, 1 or H, n_q, n_k]`: 0 skips a block, 1 reads it exactly, and a pool
            factor reads its means. Blocks of any other number are skipped.
        factors: the pool factors that occur, ascending.
        room: places in `indices` for each row, at least as many as the longest row lists; with it
            the device is not waited for. `None` makes rows as long as their entries.
        tail, hidden, order: the plan's fields of these names.

    Raises:
        ValueError: a level matrix of another shape or dtype.
    """
    expected = (q_blocks.n, k_blocks.n)
    if level.ndim != 4 or level.dtype != torch.uint8 or level.shape[2:] != expected:
        raise ValueError(
            f"Expected levels of dtype torch.uint8 and shape [1 or B, 1 or H, {expected[0]}, "
            f"{expected[1]}], got {level.dtype} {list(level.shape)}."
        )
    n_k = k_blocks.n
    # One integer key holds the part of the row and the block: sorting it puts every entry in place.
    classes = (1, *factors)
    rank = torch.full_like(level, len(classes), dtype=torch.int32)
    counts = []
    for number, factor in enumerate(classes):
        chosen = level == factor
        rank.masked_fill_(chosen, number)
        counts.append(chosen.sum(-1, dtype=torch.int32))
    place = (rank * n_k + torch.arange(n_k, dtype=torch.int32, device=level.device)).sort(-1).values
    count = torch.stack(counts).sum(0, dtype=torch.int32)
    if room is None:
        indices = place[place < len(classes) * n_k]
        ends = count.flatten().cumsum(0, dtype=torch.int64).view(count.shape)
        offsets = ends - count
    else:
        indices = place[..., :room].flatten()
        rows = torch.arange(count.numel(), device=level.device).view(count.shape)
        offsets = rows * min(room, n_k)
    if indices.numel() > torch.iinfo(torch.int32).max:
        raise ValueError(
            f"Expected at most 2**31 - 1 entries in a plan, got {indices.numel()}. Use larger "
            "blocks or share lists between heads."
        )
    return BlockPlan(
        q_blocks=q_blocks,
        k_blocks=k_blocks,
        indices=indices % n_k,
        offsets=offsets.to(torch.int32),
        full=counts[0],
        partial=torch.zeros_like(counts[0]),
        pools=Pools(factors, torch.stack(counts[1:], -1)) if factors else None,
        tail=tail,
        hidden=hidden,
        order=order,
    )
