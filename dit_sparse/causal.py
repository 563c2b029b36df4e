"""Plans in which no query reads a key behind it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dit_sparse.levels import plan_of_levels
from dit_sparse.plan import BlockPlan, Blocks
from dit_sparse.predicate import BoxPredicate


def past(blocks: Blocks) -> Tensor:
    """bool `[n, n]`: whether all keys of a block stand before all queries of another."""
    number = torch.arange(blocks.n, device=blocks.starts.device)
    return number < number[:, None]


def plan_of_causal_levels(
    level: Tensor, blocks: Blocks, *, factors: tuple[int, ...] = ()
) -> BlockPlan:
    """The plan that reads every key block of the past at its level.

    Of its own block a query reads the keys up to its own, exactly, whatever the level; of later
    blocks it reads nothing. A mean over g keys is thus read only if all of them are in the past,
    as the public code of PSA has it (arXiv 2512.04025). To a backend this is a plan like others,
    with one masked entry in every row.

    Args:
        level: uint8 `[1 or B, 1 or H, n, n]`, see `plan_of_levels`.
        factors: the pool factors that occur, ascending.

    Raises:
        ValueError: a level matrix of another shape or dtype.
    """
    before = past(blocks).to(level.device)
    level = level.masked_fill(~before, 0)
    level = level.masked_fill(before.new_ones(blocks.n).diag(), 1)
    plan = plan_of_levels(level, blocks, blocks, factors=factors, room=blocks.n, uneven=True)
    token = torch.arange(blocks.total, dtype=torch.int32, device=level.device)
    guard = 1 << blocks.total.bit_length()
    box = BoxPredicate(torch.zeros_like(token)[None], token[None], token, token, guard)
    # Exact entries ascend and no later block is listed: a row's own block is the last of them.
    own = torch.ones_like(plan.full)
    return replace(plan, full=plan.full - own, partial=own, box=box)
