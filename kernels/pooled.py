"""Adds a plan's pooled entries to the result for its exact entries, in a specialised Hopper kernel.

Every level is read in tiles of the same few rows: a block that is pooled by less fills several.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.backend import AttentionOutput
from dit_sparse.kernels import tail
from dit_sparse.kernels._hopper_tail import _pooled_fwd_hopper
from dit_sparse.kernels._pooled import _pooled_tiles_fwd
from dit_sparse.kernels.hopper import Matrix, with_scratch
from dit_sparse.kernels.launch import Launch, TensorDescriptor, launch_specialised
from dit_sparse.kernels.pool import Means, Tiles, pool_all
from dit_sparse.kernels.portable import LOG2_E, list_strides, padded
from dit_sparse.plan import BlockPlan, Pools

#: Pooled rows of a tile: 8-fold pooling leaves 16 of a block of 128, 4-fold pooling 32.
ROWS = 32
#: Tiles in flight; they are small. The kernel counts on as many stale barriers.
STAGES = 4


class Lists(NamedTuple):
    """Which tiles the query blocks of a plan read.

    Args:
        tiles: int32, numbers of tiles; a row begins at `per_entry` times its offset in the plan.
        counts: int32 of the shape of the plan's offsets.
        per_entry: the most tiles of an entry.
    """

    tiles: Tensor
    counts: Tensor
    per_entry: int


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    result: AttentionOutput,
    bias_dtype: torch.dtype = torch.bfloat16,
) -> bool:
    """Goes on from `result`; whether it could, and nothing written if not: for some strides of q,
    or where Triton compiles the kernel badly.

    Args:
        q, k, v: `[B, H, N, D]` in plan order, unit stride along D and one head dim.
    """
    qm = Matrix.of(q)
    if qm is None or plan.pools is None:
        return False
    tiles = Tiles(ROWS, scale, bias_dtype)
    keys, values = pool_all((k, v), plan.k_blocks, factors=plan.pools.factors, tiles=tiles)
    lists = lists_of(plan, plan.pools)
    run = functools.partial(_launch, q, qm, keys, values, lists, plan, scale, result)
    return with_scratch(run) is not None


def lists_of(plan: BlockPlan, pools: Pools) -> Lists:
    """The tiles of every row of a plan."""
    size = plan.k_blocks.size
    per_entry = max(1, size // pools.factors[0] // ROWS)
    tiles = torch.empty(
        max(1, plan.indices.numel() * per_entry), dtype=torch.int32, device=plan.device
    )
    counts = torch.empty_like(plan.offsets)
    _pooled_tiles_fwd[(counts.numel(),)](
        plan.indices, plan.offsets, plan.full, plan.partial, pools.counts, tiles, counts,
        plan.k_blocks.n,
        SIZE=size, FACTORS=sum(pools.factors), N_FACTORS=len(pools.factors), ROWS=ROWS,
        PER_ENTRY=per_entry, BLOCK=64, num_warps=1,
    )  # fmt: skip
    return Lists(tiles, counts, per_entry)


def _launch(
    q: Tensor,
    qm: Matrix,
    keys: Means,
    values: Means,
    lists: Lists,
    plan: BlockPlan,
    scale: float,
    result: AttentionOutput,
) -> Launch | None:
    out, lse = result
    batch, heads, n_queries, head_dim = q.shape
    dim, n_blocks = padded(head_dim), plan.q_blocks.n
    picture = plan.q_blocks.picture or range(n_blocks)
    order = plan.offsets if plan.order is None else plan.order.index
    rows = keys.pooled.shape[2]
    shape = [batch * heads * rows, head_dim]
    described = [
        TensorDescriptor(x.pooled, shape, [head_dim, 1], [ROWS, dim]) for x in (keys, values)
    ]
    arguments = (
        q, *described, tail.describe(keys.bias), out, lse,
        plan.offsets, lists.counts, lists.tiles, plan.q_blocks.starts, order,
        *qm.shape, qm.row_stride, *qm.origin, rows, *out.stride()[:3],
        *list_strides(plan), order.stride(0) if order.ndim == 2 else 0,
        heads, n_blocks, n_blocks - len(picture), picture.start, n_queries, lists.per_entry,
        scale * LOG2_E,
    )  # fmt: skip
    constants = {
        "D": head_dim,
        "BLOCK_D": dim,
        "BLOCK_M": plan.q_blocks.size,
        "BLOCK_N": ROWS,
        "HAS_ORDER": plan.order is not None,
    }
    grid = (batch * heads * n_blocks, 1, 1)
    return launch_specialised(
        _pooled_fwd_hopper, grid, arguments, constants, warps=4, stages=STAGES
    )
