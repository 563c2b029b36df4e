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
from dit_sparse.kernels import hopper_gluon
from dit_sparse.kernels._hopper_pooled import _pooled_fwd_hopper
from dit_sparse.kernels._pooled import _pooled_tiles_fwd
from dit_sparse.kernels._pooled_again import _pooled_again_fwd
from dit_sparse.kernels.hopper import Matrix, with_scratch
from dit_sparse.kernels.launch import Launch, TensorDescriptor, launch_specialised
from dit_sparse.kernels.pool import Means, pool_all
from dit_sparse.kernels.portable import LOG2_E, list_strides, padded
from dit_sparse.kernels.variants import Kernel
from dit_sparse.plan import BlockPlan, Pools

try:
    from dit_sparse.kernels._gluon_pooled import _pooled_fwd_hopper_gluon
except ImportError:  # a Triton without Gluon, or without what this needs of it
    _pooled_fwd_hopper_gluon = None

_BLOCK = 128  # keys
#: Pooled rows of a tile: 4-fold pooling leaves 32 of a block of 128.
ROWS = 32
#: Likewise of the kernel in Gluon, where more tiles of a step cost nothing: then 8-fold pooling
#: computes no row twice.
ROWS_IN_GLUON = 16
#: Steps in flight. The kernel counts on as many stale barriers.
STAGES = 2
#: Whether queries stay in registers: where Triton 3.9 keeps them it spills others.
HELD = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)
#: Registers that the kernel in Gluon may keep in memory: once for a query block, and of the warp
#: that fetches, which has time. None where it multiplies.
SPILLS = 64
_MOST_TILES = 1 << 20  # of a head, in the bits of an entry
#: Query blocks that a program looks at for rows to be computed again.
EACH = 4


class Lists(NamedTuple):
    """Which tiles the query blocks of a plan read.

    Args:
        tiles: int32, see `_pooled_tiles_fwd`; a row begins at `per_entry` times its offset in the
            plan.
        wholes: int32 of the shape of the plan's offsets: how many are whole; these are first.
        counts: likewise, of all.
        per_entry: the most tiles of an entry.
        rows: of a tile.
    """

    tiles: Tensor
    wholes: Tensor
    counts: Tensor
    per_entry: int
    rows: int


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    result: AttentionOutput,
    lengths: tuple[Tensor, Tensor] | None = None,
    *,
    kernel: Kernel = "hopper",
) -> bool:
    """Goes on from `result`; whether it could, and nothing written if not: for some strides of q,
    head dims that are no multiple of 8, other key blocks than of 128, or where Triton compiles the
    kernel badly.

    Args:
        kernel: "hopper_gluon" for the one in Gluon, where it can run.
        q, k, v: `[B, H, N, D]` in plan order, unit stride along D and one head dim.
        lengths: of the queries and of the longest key, see `norms`: no mean is longer. What follows
            from them takes the place of running maxima, and a second launch that of rows for which
            it is too far away. For bfloat16, which has the exponents of float32.
    """
    qm, size = Matrix.of(q), plan.k_blocks.size
    if qm is None or plan.pools is None or size != _BLOCK or q.shape[-1] * q.element_size() % 16:
        return False
    again = None if lengths is None else torch.empty(q.shape[:3], dtype=torch.int8, device=q.device)
    kinds = [(ROWS, _launch_triton)]
    # What was refused once is not made lists for again.
    kind = (
        *(q.device, q.dtype, q.shape[-1], plan.pools.factors, plan.k_blocks.ragged),
        *(plan.order is None, again is None),
    )
    if kernel == "hopper_gluon" and _in_gluon(scale) and kind not in _refused:
        kinds.insert(0, (ROWS_IN_GLUON, _launch_gluon))
    for rows, run in kinds:
        of_block = sum(_tiles_of(size, factor, rows) for factor in plan.pools.factors)
        if plan.k_blocks.n * of_block >= _MOST_TILES:
            continue
        keys, values = pool_all((k, v), plan.k_blocks, factors=plan.pools.factors, least=rows)
        given = (keys, values, lists_of(plan, plan.pools, rows), plan, scale, result)
        if run(q, qm, *given, lengths, again) is None:
            if run is _launch_gluon:
                _refused.add(kind)
            continue
        if again is not None:
            _launch_again(q, *given, again)
        return True
    return False


def _in_gluon(scale: float) -> bool:
    return _pooled_fwd_hopper_gluon is not None and hopper_gluon.unavailable() is None and scale > 0


#: Kinds of calls whose kernel in Gluon was compiled badly.
_refused: set[tuple[object, ...]] = set()


def _tiles_of(size: int, factor: int, rows: int) -> int:
    """Tiles of a block of so many tokens."""
    return max(1, size // factor // rows)


def lists_of(plan: BlockPlan, pools: Pools, rows: int) -> Lists:
    """The tiles, of so many pooled rows, of every row of a plan."""
    blocks = plan.k_blocks
    per_entry = _tiles_of(blocks.size, pools.factors[0], rows)
    room = max(1, plan.indices.numel() * per_entry)
    tiles = torch.empty(room, dtype=torch.int32, device=plan.device)
    wholes, counts = torch.empty_like(plan.offsets), torch.empty_like(plan.offsets)
    _pooled_tiles_fwd[(counts.numel(),)](
        plan.indices, plan.offsets, plan.full, plan.partial, pools.counts, blocks.starts, tiles,
        wholes, counts, blocks.n,
        SIZE=blocks.size, FACTORS=sum(pools.factors), N_FACTORS=len(pools.factors), ROWS=rows,
        PER_ENTRY=per_entry, RAGGED=blocks.ragged, BLOCK=64, num_warps=1,
    )  # fmt: skip
    return Lists(tiles, wholes, counts, per_entry, rows)


def _launch_triton(
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
    batch, heads, n_queries, head_dim = q.shape
    dim, n_blocks = padded(head_dim), plan.q_blocks.n
    picture = plan.q_blocks.picture or range(n_blocks)
    rows = keys.pooled.shape[2]
    shape = [batch * heads * rows, head_dim]
    described = [
        TensorDescriptor(x.pooled, shape, [head_dim, 1], [lists.rows, dim]) for x in (keys, values)
    ]
    arguments = (
        q, *described, *_written(plan, result, lengths, again),
        plan.offsets, lists.counts, lists.tiles, plan.q_blocks.starts, _order(plan),
        *qm.shape, qm.row_stride, *qm.origin, rows, *_strides(plan, result),
        heads, n_blocks, n_blocks - len(picture), picture.start, n_queries, lists.per_entry,
        scale * LOG2_E,
    )  # fmt: skip
    constants = _constants(q, plan, lists.rows) | {"HELD": HELD, "BOUND": lengths is not None}
    grid = (batch * heads * n_blocks, 1, 1)
    run = functools.partial(launch_specialised, _pooled_fwd_hopper, grid, arguments, constants)
    return with_scratch(functools.partial(run, warps=4, stages=STAGES))


def _launch_gluon(
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
    batch, heads, n_queries, head_dim = q.shape
    dim, n_blocks = padded(head_dim), plan.q_blocks.n
    rows = keys.pooled.shape[2]
    shape = (batch * heads * rows, head_dim)
    means = (Matrix(x.pooled, shape, head_dim, 0, 0, 0) for x in (keys, values))
    tiles = batch * heads * n_blocks
    rings = hopper_gluon.rings_for(dim)
    arguments = (
        hopper_gluon.describe(qm, [hopper_gluon.ROWS.value, dim]),
        *(hopper_gluon.describe(x, [lists.rows, dim]) for x in means),
        *_written(plan, result, lengths, again),
        plan.offsets, lists.wholes, lists.counts, lists.tiles, plan.q_blocks.starts, _order(plan),
        *qm.origin, rows, *_strides(plan, result),
        tiles, heads, n_blocks, n_queries, scale * LOG2_E,
    )  # fmt: skip
    constants = {
        "D": head_dim,
        "BLOCK_D": dim,
        "KEYS": lists.rows,
        "EACH": lists.per_entry,
        "MOST": plan.k_blocks.size.bit_length() - lists.rows.bit_length(),
        "RAGGED": plan.k_blocks.ragged,
        "HAS_ORDER": plan.order is not None,
        "BOUND": lengths is not None,
        "Q_SLOTS": rings.queries,
        "SLOTS": rings.keys,
        "V_SLOTS": rings.values,
    }
    grid = (min(tiles, hopper_gluon.multiprocessors(q.device)), 1, 1)
    return launch_specialised(
        _pooled_fwd_hopper_gluon, grid, arguments, constants, warps=4, stages=2, spills=SPILLS
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
    _pooled_again_fwd[(batch * heads * -(-plan.q_blocks.n // EACH),)](
        q, keys.pooled, values.pooled, out, lse, again,
        plan.offsets, lists.counts, lists.tiles, plan.q_blocks.starts, _order(plan),
        *q.stride()[:3], keys.pooled.shape[2], *_strides(plan, result),
        heads, plan.q_blocks.n, n_queries, lists.per_entry, scale * LOG2_E,
        **_constants(q, plan, lists.rows), EACH=EACH, num_warps=8, num_stages=2,
    )  # fmt: skip


def _written(
    plan: BlockPlan,
    result: AttentionOutput,
    lengths: tuple[Tensor, Tensor] | None,
    again: Tensor | None,
) -> tuple[Tensor, ...]:
    """What a kernel goes on from, lengths for its bound, and where it marks rows; any other tensor
    for what there is not."""
    return (*result, *(lengths or (result.lse,) * 2), plan.offsets if again is None else again)


def _order(plan: BlockPlan) -> Tensor:
    return plan.offsets if plan.order is None else plan.order.index


def _strides(plan: BlockPlan, result: AttentionOutput) -> tuple[int, ...]:
    """Of results, of lists and of orders of heads."""
    of_heads = plan.order is not None and plan.order.index.ndim == 2
    by_head = _order(plan).stride(0) if of_heads else 0
    return (*result.out.stride()[:3], *list_strides(plan), by_head)


def _constants(q: Tensor, plan: BlockPlan, rows: int) -> dict[str, int]:
    """What both kernels are compiled for."""
    return {
        "D": q.shape[-1],
        "BLOCK_D": padded(q.shape[-1]),
        "BLOCK_M": plan.q_blocks.size,
        "ROWS": rows,
        "LOG_SIZE": plan.k_blocks.size.bit_length() - 1,
        "LOG_ROWS": rows.bit_length() - 1,
        "RAGGED": plan.k_blocks.ragged,
        "HAS_ORDER": plan.order is not None,
    }
