"""Adds a plan's tail to the result for its listed blocks, with the specialised Hopper kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.backend import AttentionOutput
from dit_sparse.kernels import hopper
from dit_sparse.kernels._tail import _tail_bias_fwd
from dit_sparse.kernels.launch import Launch
from dit_sparse.kernels.pool import pool_all
from dit_sparse.plan import BlockPlan

#: Means of a tile.
_TILE = 128


def runs(plan: BlockPlan) -> bool:
    """Whether the plan has a tail of means alone; the portable kernel adds those with slopes."""
    return plan.tail == "zeroth"


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    result: AttentionOutput,
) -> Launch | None:
    """Goes on from `result`; `None`, and nothing written, if strides do not allow it.

    Args:
        q, k, v: `[B, H, N, D]` in plan order, unit stride along D.
    """
    pooled = pool_all((k, v), plan.k_blocks, tile=_TILE, hidden=plan.hidden)
    keys, values = (means.tiled for means in pooled)
    bias = bias_of(plan, keys.shape[2])
    return hopper.launch_tail(q, hopper.Tail(keys, values, bias, _TILE), plan, scale, result)


def bias_of(plan: BlockPlan, width: int) -> Tensor:
    """fp32 `[1 or B, 1 or H, n_q, width]`: log2 of the tokens of every block that the tail stands
    for, -inf for all others and for what is beyond the last block."""
    visited, hidden = plan.visited, plan.hidden
    batch, heads, n_q, n_k = visited.shape
    batch = max(batch, 1 if hidden is None else hidden.shape[0])
    bias = torch.empty(batch, heads, n_q, width, dtype=torch.float32, device=visited.device)
    _tail_bias_fwd[(batch * heads * n_q,)](
        visited.view(torch.uint8), plan.offsets if hidden is None else hidden.view(torch.uint8),
        plan.k_blocks.starts, bias,
        heads * n_q * n_k if visited.shape[0] > 1 else 0, n_q * n_k if heads > 1 else 0,
        n_k if hidden is not None and hidden.shape[0] > 1 else 0, heads, n_q, n_k,
        WIDTH=width, BLOCK=64, HAS_HIDDEN=hidden is not None, num_warps=1,
    )  # fmt: skip
    return bias
