"""Plans from a level for every pair of blocks: skipped, exact, or pooled by a factor."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.grid import Permutation
from dit_sparse.list_lengths import check_entries
from dit_sparse.plan import BlockPlan, Blocks, Pools, Tail

_SORTED = 1 << 22  # block pairs sorted at a time, which bounds the memory that it takes


def plan_of_levels(
    level: Tensor,
    q_blocks: Blocks,
    k_blocks: Blocks,
    *,
    factors: tuple[int, ...] = (),
    room: int | None = None,
    total: int | None = None,
    tail: Tail = "none",
    hidden: Tensor | None = None,
    order: Permutation | None = None,
    uneven: bool = False,
    lasting: bool = False,
) -> BlockPlan:
    """The plan that reads every key block at its level.

    Args:
        level: uint8 `[1 or B, 1 or H, n_q, n_k]`: 0 skips a block, 1 reads it exactly, and a pool
            factor reads its means. Blocks of any other number are skipped.
        factors: the pool factors that occur, ascending.
        room: places in `indices` for each row, at least as many as the longest row lists; with it
            the device is not waited for. `None` makes rows as long as their entries.
        total: entries of all rows, where the host knows: then rows are as long as their entries,
            and the device is not waited for either.
        tail, hidden, order, uneven, lasting: the plan's fields of these names.

    Raises:
        ValueError: a level matrix of another shape or dtype.
    """
    expected = (q_blocks.n, k_blocks.n)
    if level.ndim != 4 or level.dtype != torch.uint8 or level.shape[2:] != expected:
        raise ValueError(
            f"Expected levels of dtype torch.uint8 and shape [1 or B, 1 or H, {expected[0]}, "
            f"{expected[1]}], got {level.dtype} {list(level.shape)}."
        )
    classes = (1, *factors)
    counts = torch.stack([(level == factor).sum(-1, dtype=torch.int32) for factor in classes])
    count = counts.sum(0, dtype=torch.int32)
    if room is None or total is not None:
        offsets = count.flatten().cumsum(0, dtype=torch.int64).view(count.shape) - count
    else:
        rows = torch.arange(count.numel(), device=level.device).view(count.shape)
        offsets = rows * min(room, k_blocks.n)
    if total is None:
        indices = _entries(level, classes, room)
    else:
        indices = _known_entries(level, classes, count, offsets, total)
    check_entries(indices.numel())
    plan = BlockPlan(
        q_blocks=q_blocks,
        k_blocks=k_blocks,
        indices=indices,
        offsets=offsets.to(torch.int32),
        full=counts[0],
        partial=torch.zeros_like(count),
        pools=Pools(factors, counts[1:].movedim(0, -1)) if factors else None,
        tail=tail,
        hidden=hidden,
        order=order,
        uneven=uneven,
        lasting=lasting,
    )
    if tail != "none":
        # Kernels ask for it, and getting it from the lists would wait for the device.
        vars(plan)["visited"] = _rank(level, classes) < len(classes)
    return plan


def _rank(level: Tensor, classes: tuple[int, ...]) -> Tensor:
    """uint8: the number of the part of a row that every block goes to; `len(classes)`: to none."""
    rank = torch.full_like(level, len(classes))
    for number, factor in enumerate(classes):
        rank.masked_fill_(level == factor, number)
    return rank


def _known_entries(
    level: Tensor, classes: tuple[int, ...], count: Tensor, offsets: Tensor, total: int
) -> Tensor:
    """`_entries` without room, of rows whose lengths add up to `total`."""
    n_k = level.shape[-1]
    column = torch.arange(n_k, device=level.device)
    # What a row does not list goes to one place behind all others.
    indices = torch.empty(total + 1, dtype=torch.int32, device=level.device)
    rows = (
        x.reshape(-1, *x.shape[3:]).split(max(1, _SORTED // n_k)) for x in (level, count, offsets)
    )
    for part, length, first in zip(*rows, strict=True):
        key = (_rank(part, classes).int() * n_k + column.int()).sort(-1).values
        place = torch.where(column < length[:, None], first[:, None] + column, total)
        indices.scatter_(0, place.flatten(), (key % n_k).flatten())
    return indices[:total]


def _entries(level: Tensor, classes: tuple[int, ...], room: int | None) -> Tensor:
    """int32 block numbers, row by row: those of every part ascending, then, up to `room`, others.

    One integer key holds the part of the row and the block: sorting it puts every entry in place.
    """
    n_k = level.shape[-1]
    block = torch.arange(n_k, dtype=torch.int32, device=level.device)
    found = []
    for rows in level.reshape(-1, n_k).split(max(1, _SORTED // n_k)):
        key = _rank(rows, classes).int() * n_k + block
        key = key.sort(-1).values
        found.append(key[key < len(classes) * n_k] if room is None else key[:, :room].flatten())
    return torch.cat(found) % n_k
