"""Adds a plan's pooled entries to the result for its exact entries, in a specialised Hopper kernel.

Every level is read in tiles of the same few rows: a block that is pooled by less fills several, and
one that is pooled by more has every row in its tile several times, with a part of the weight each.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dit_sparse.backend import AttentionOutput
from dit_sparse.kernels._hopper_pooled import _pooled_fwd_hopper
from dit_sparse.kernels._pooled import _pooled_tiles_fwd
from dit_sparse.kernels._pooled_again import _pooled_again_fwd
from dit_sparse.kernels.hopper import Matrix, with_scratch
from dit_sparse.kernels.launch import Launch, TensorDescriptor, launch_specialised
from dit_sparse.kernels.pool import Means, pool_all
from dit_sparse.kernels.portable import LOG2_E, list_strides, padded
from dit_sparse.plan import BlockPlan, Pools

_BLOCK = 128  # keys
#: Pooled rows of a tile: 4-fold pooling leaves 32 of a block of 128.
ROWS = 32
#: Steps in flight. The kernel counts on as many stale barriers.
STAGES = 2
#: Whether queries stay in registers: where Triton 3.9 keeps them it spills others.
HELD = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)
_MOST_TILES = 1 << 20  # of a head, in the bits of an entry
#: Query blocks that a program looks at for rows to be computed again.
EACH = 4


class Lists(NamedTuple):
    """Which tiles the query blocks of a plan read.

    Args:
        tiles: int32, see `_pooled_tiles_fwd`; a row begins at `per_entry` times its offset in the
            plan.
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
    lengths: tuple[Tensor, Tensor] | None = None,
) -> bool:
    """Goes on from `result`; whether it could, and nothing written if not: for some strides of q,
    head dims that are no multiple of 8, other key blocks than of 128, or where Triton compiles the
    kernel badly.

    Args:
        q, k, v: `[B, H, N, D]` in plan order, unit stride along D and one head dim.
        lengths: of the queries and of the longest key, see `norms`: no mean is longer. What follows
            from them takes the place of running maxima, and a second launch that of rows for which
            it is too far away. For bfloat16, which has the exponents of float32.
    """
    qm, size = Matrix.of(q), plan.k_blocks.size
    if qm is None or plan.pools is None or size != _BLOCK or q.shape[-1] * q.element_size() % 16:
        return False
    if plan.k_blocks.n * sum(max(1, size // g // ROWS) for g in plan.pools.factors) >= _MOST_TILES:
        return False
    keys, values = pool_all((k, v), plan.k_blocks, factors=plan.pools.factors, least=ROWS)
    lists = lists_of(plan, plan.pools)
    again = None if lengths is None else torch.empty(q.shape[:3], dtype=torch.int8, device=q.device)
    given = (keys, values, lists, plan, scale, result)
    run = functools.partial(_launch, q, qm, *given, lengths, again)
    if with_scratch(run) is None:
        return False
    if again is not None:
        _launch_again(q, *given, again)
    return True


def lists_of(plan: BlockPlan, pools: Pools) -> Lists:
    """The tiles of every row of a plan."""
    blocks = plan.k_blocks
    per_entry = max(1, blocks.size // pools.factors[0] // ROWS)
    room = max(1, plan.indices.numel() * per_entry)
    tiles = torch.empty(room, dtype=torch.int32, device=plan.device)
    counts = torch.empty_like(plan.offsets)
    _pooled_tiles_fwd[(counts.numel(),)](
        plan.indices, plan.offsets, plan.full, plan.partial, pools.counts, blocks.starts, tiles,
        counts, blocks.n,
        SIZE=blocks.size, FACTORS=sum(pools.factors), N_FACTORS=len(pools.factors), ROWS=ROWS,
        PER_ENTRY=per_entry, RAGGED=blocks.ragged, BLOCK=64, num_warps=1,
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
    lengths: tuple[Tensor, Tensor] | None,
    again: Tensor | None,
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
        q, *described, out, lse, *(lengths or (lse, lse)), plan.offsets if again is None else again,
        plan.offsets, lists.counts, lists.tiles, plan.q_blocks.starts, order,
        *qm.shape, qm.row_stride, *qm.origin, rows, *out.stride()[:3],
        *list_strides(plan), order.stride(0) if order.ndim == 2 else 0,
        heads, n_blocks, n_blocks - len(picture), picture.start, n_queries, lists.per_entry,
        scale * LOG2_E,
    )  # fmt: skip
    constants = _constants(q, plan) | {"HELD": HELD, "BOUND": lengths is not None}
    grid = (batch * heads * n_blocks, 1, 1)
    return launch_specialised(
        _pooled_fwd_hopper, grid, arguments, constants, warps=4, stages=STAGES
    )


def _launch_again(
    q: Tensor,
    keys: Means,
    values: Means,
    lists: Lists,
    plan: BlockPlan,
    scale: float,
    result: AttentionOutput,
    again: Tensor,
) -> None:
    """Computes rows that `again` marks."""
    out, lse = result
    batch, heads, n_queries, _ = q.shape
    order = plan.offsets if plan.order is None else plan.order.index
    _pooled_again_fwd[(batch * heads * -(-plan.q_blocks.n // EACH),)](
        q, keys.pooled, values.pooled, out, lse, again,
        plan.offsets, lists.counts, lists.tiles, plan.q_blocks.starts, order,
        *q.stride()[:3], keys.pooled.shape[2], *out.stride()[:3],
        *list_strides(plan), order.stride(0) if order.ndim == 2 else 0,
        heads, plan.q_blocks.n, n_queries, lists.per_entry, scale * LOG2_E,
        **_constants(q, plan), EACH=EACH, num_warps=8, num_stages=2,
    )  # fmt: skip


def _constants(q: Tensor, plan: BlockPlan) -> dict[str, int]:
    """What both kernels are compiled for."""
    return {
        "D": q.shape[-1],
        "BLOCK_D": padded(q.shape[-1]),
        "BLOCK_M": plan.q_blocks.size,
        "ROWS": ROWS,
        "LOG_SIZE": plan.k_blocks.size.bit_length() - 1,
        "LOG_ROWS": ROWS.bit_length() - 1,
        "RAGGED": plan.k_blocks.ragged,
        "HAS_ORDER": plan.order is not None,
    }
