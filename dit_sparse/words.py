"""Masks of partial entries as words of 32 bits, a bit for each key of the block."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dit_sparse.plan import BlockPlan


def bits(plan: BlockPlan, entries: Tensor) -> Tensor:
    """bool `[entries, k_blocks.size]`: the words of these entries of a plan, bit by bit.

    Raises:
        ValueError: the plan has no words.
    """
    if plan.words is None:
        raise ValueError("Expected a plan with words, got one without. Ask for `words` first.")
    key = torch.arange(plan.k_blocks.size, device=plan.device)
    return (plan.words[entries][:, key // 32] >> (key % 32)) & 1 != 0


def read_keys(plan: BlockPlan) -> Tensor:
    """bool `[1 or B, 1 or H, n_q, N_k]`: the keys of partial entries that words show."""
    first, none = plan.offsets + plan.full, torch.zeros_like(plan.partial)
    part = replace(plan, offsets=first, full=plan.partial, partial=none, pools=None)
    entries = part.entries
    rows = torch.arange(none.numel(), device=plan.device)
    rows = rows.repeat_interleave(plan.partial.reshape(-1))
    block = plan.indices[entries].long()
    key = torch.arange(plan.k_blocks.size, device=plan.device)
    real = key < plan.k_blocks.lengths[block, None]
    token = torch.where(real, plan.k_blocks.starts[block, None] + key, plan.k_blocks.total)
    shape = (none.numel(), plan.k_blocks.total + 1)
    read = torch.zeros(shape, dtype=torch.bool, device=plan.device)
    read[rows[:, None], token] = bits(plan, entries) & real
    return read[:, :-1].unflatten(0, none.shape)
