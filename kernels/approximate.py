"""Adds a plan's pooled entries and its tail to the result for its exact entries, on any GPU.

The exact entries are the work of another kernel. Pooled rows are few, so this one is a second,
short pass over the queries, and the other stays as fast as it is without them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.backend import AttentionOutput
from dit_sparse.kernels._approximate import _approximate_fwd
from dit_sparse.kernels.architecture import architecture
from dit_sparse.kernels.pool import Means, covariances, pool_all, slope
from dit_sparse.kernels.portable import LOG2_E, list_strides, padded
from dit_sparse.plan import BlockPlan

_BYTE = torch.uint8
#: Queries and pooled rows of a tile, warps and stages.
AMD_TILE = (64, 32, 4, 1)
_TAILS = {"none": 0, "zeroth": 1, "first": 2, "block": 3}


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    result: AttentionOutput,
    *,
    pools: bool = True,
    tail: bool = True,
) -> None:
    """Adds to `result`, which holds the softmax over the plan's exact entries.

    Args:
        q: `[B, H, N_q, D]` in the caller's order, unit stride along D.
        k, v: in plan order, unit stride along D.
        pools, tail: what to add, of what the plan has.
    """
    out, lse = result
    batch, heads, n_queries, head_dim = q.shape
    value_dim = v.shape[-1]
    factors = plan.pools.factors if pools and plan.pools is not None else ()
    has_tail = tail and plan.tail != "none"
    keys, values = pool_all((k, v), plan.k_blocks, factors=factors, means=has_tail)
    line = _slope(k, v, plan, keys) if has_tail else None
    order = plan.offsets if plan.order is None else plan.order.index
    hidden = plan.offsets if plan.hidden is None else plan.hidden.view(_BYTE)
    block_d, block_dv = padded(head_dim), padded(value_dim)
    wide = max(block_d, block_dv) > 128
    amd = architecture(q.device).startswith("gfx")
    rows, columns, warps, stages = _tile(plan, wide or q.element_size() == 4, has_tail, amd)
    parts = plan.q_blocks.size // rows
    _approximate_fwd[(batch * heads * plan.q_blocks.n * parts,)](
        q, keys.pooled, values.pooled, keys.bias, keys.blocks, values.blocks,
        keys.blocks if line is None else line, out, lse,
        plan.indices, plan.offsets, plan.full, plan.partial,
        plan.offsets if plan.pools is None else plan.pools.counts,
        plan.visited.view(_BYTE) if has_tail else plan.offsets, hidden,
        plan.k_blocks.starts, plan.q_blocks.starts, order,
        *q.stride()[:3], *out.stride()[:3], *list_strides(plan),
        order.stride(0) if plan.order is not None and order.ndim == 2 else 0,
        plan.k_blocks.n if plan.hidden is not None and plan.hidden.shape[0] > 1 else 0,
        heads, plan.q_blocks.n, plan.k_blocks.n, n_queries, keys.pooled.shape[2],
        scale, scale * LOG2_E,
        D=head_dim, DV=value_dim, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_M=rows, PARTS=parts,
        BLOCK_N=columns, CHUNK=min(block_d, 32 if wide or amd else 64),
        SIZE=plan.k_blocks.size, FACTORS=sum(factors), N_FACTORS=len(factors),
        TAIL=_TAILS[plan.tail] if has_tail else 0, HAS_HIDDEN=plan.hidden is not None,
        HAS_ORDER=plan.order is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _tile(plan: BlockPlan, large: bool, tail: bool, amd: bool) -> tuple[int, int, int, int]:
    """Queries and pooled rows of a tile, warps and stages."""
    size = plan.q_blocks.size
    if amd:  # all others need 80 KiB of shared memory, or registers that are not there
        rows, columns, warps, stages = AMD_TILE
        return min(size, rows), columns, warps, stages
    return (size, 32 if large else 64, 8 if size >= 128 else 4, 2 if large or tail else 3)


def _slope(k: Tensor, v: Tensor, plan: BlockPlan, keys: Means) -> Tensor | None:
    """Key-value covariance per token, in the dtype of `k`: of all tokens, or of each block."""
    if plan.tail == "block":
        return covariances(k, v, plan.k_blocks, keys.blocks)
    if plan.tail != "first":
        return None
    return slope(k, v, plan.k_blocks, keys.blocks, plan.hidden)
