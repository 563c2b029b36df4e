"""Runs a plan's full entries and the means of its tail with one specialised Hopper kernel.

Means of blocks stand behind the keys and values as further rows of theirs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from dit_sparse.backend import AttentionOutput
from dit_sparse.kernels._hopper_tail import _tail_fwd_hopper
from dit_sparse.kernels._tail import _tail_bias_fwd
from dit_sparse.kernels.hopper import Matrix, with_scratch
from dit_sparse.kernels.launch import Launch, TensorDescriptor, launch_specialised
from dit_sparse.kernels.portable import LOG2_E, MeanBiases, list_strides, padded
from dit_sparse.plan import BlockPlan

#: Means of a tile, and keys of a block.
TILE = 128


def runs(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> bool:
    """Whether the plan has a tail of means, with a slope for all of them or without, and no masks,
    and its tensors can stand in one buffer."""
    alike = q.shape == k.shape == v.shape and plan.k_blocks.size == TILE
    return alike and plan.predicate is None and plan.tail in ("zeroth", "first")


def has_slope(plan: BlockPlan) -> bool:
    """Whether `slope.add` is to follow."""
    return plan.tail == "first"


def rows(plan: BlockPlan) -> int:
    """Means behind the tokens of a head: those of all blocks, and zeros up to whole tiles."""
    return -(-plan.k_blocks.n // TILE) * TILE


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    biases: MeanBiases,
    plan: BlockPlan,
    scale: float,
    result: AttentionOutput,
    lengths: tuple[Tensor, Tensor] | None = None,
    share: Tensor | None = None,
) -> Launch | None:
    """Writes `result`; `None`, and nothing written, if the strides of q do not allow it, or Triton
    compiles the kernel badly.

    Args:
        q: `[B, H, N, D]` in plan order.
        k, v: `[B, H, N + rows, D]`, contiguous, see `permute.gather_with_means`.
        biases: see `bias_of`.
        lengths: see `hopper.launch`; rows that are left are for the portable kernel's repair.
        share: fp32 `[B, H, N]`, gets the share of the softmax that the means have.
    """
    qm = Matrix.of(q)
    if qm is None:
        return None
    return with_scratch(
        functools.partial(_launch, q, qm, k, v, biases, plan, scale, result, lengths, share)
    )


def _launch(
    q: Tensor,
    qm: Matrix,
    k: Tensor,
    v: Tensor,
    biases: MeanBiases,
    plan: BlockPlan,
    scale: float,
    result: AttentionOutput,
    lengths: tuple[Tensor, Tensor] | None,
    share: Tensor | None,
) -> Launch | None:
    out, lse = result
    batch, heads, n_queries, head_dim = q.shape
    dim, n_blocks = padded(head_dim), plan.q_blocks.n
    everything = range(n_blocks)
    picture = plan.q_blocks.picture or everything
    starts, counts = plan.spans
    order = starts if plan.order is None else plan.order.index
    keys = [k.numel() // head_dim, head_dim]
    described = [TensorDescriptor(x, keys, [head_dim, 1], [TILE, dim]) for x in (k, v)]
    arguments = (
        q, *described, describe(biases.pairs), out, lse,
        lse if share is None else share, *(lengths or (lse, lse)),
        plan.offsets, plan.full, starts, counts, plan.q_blocks.starts, order,
        *qm.shape, qm.row_stride, *qm.origin, k.shape[2], *out.stride()[:3],
        *list_strides(plan), order.stride(0) if order.ndim == 2 else 0,
        biases.stride_b, biases.stride_h,
        heads, n_blocks, n_blocks - len(picture), picture.start, n_queries,
        biases.tiles, n_queries, scale * LOG2_E,
    )  # fmt: skip
    constants = {
        "D": head_dim,
        "BLOCK_D": dim,
        "BLOCK_M": plan.q_blocks.size,
        "BLOCK_N": TILE,
        "HAS_ORDER": plan.order is not None,
        "BOUND": lengths is not None,
        "SHARE": share is not None,
    }
    grid = (batch * heads * n_blocks, 1, 1)
    return launch_specialised(_tail_fwd_hopper, grid, arguments, constants, warps=4, stages=2)


def describe(pairs: Tensor) -> Any:
    """A descriptor of biases: tiles of 16 rows, the first pair of which counts."""
    keys = pairs.shape[-1]
    return TensorDescriptor(pairs, [pairs.numel() // keys, keys], [keys, 1], [16, keys])


def bias_of(plan: BlockPlan, scale: float, dtype: torch.dtype = torch.bfloat16) -> MeanBiases:
    """Biases of the scores before they are scaled, each as a sum of two.

    The first TILE pairs hide the last keys of a tile, 0 and more; then come those of every query
    block of `[1 or B, 1 or H]`: log2 of the tokens of every block that the tail stands for, -1e30
    for all others and for what is beyond the last block.

    Args:
        scale: factor of the scores.
    """
    visited, hidden = plan.visited, plan.hidden
    batch, heads, n_q, n_k = visited.shape
    batch = max(batch, 1 if hidden is None else hidden.shape[0])
    tiles = rows(plan) // TILE
    n_rows = batch * heads * n_q
    pairs = torch.empty(TILE + n_rows * tiles, 2, TILE, dtype=dtype, device=visited.device)
    _tail_bias_fwd[(TILE + n_rows,)](
        visited.view(torch.uint8), plan.offsets if hidden is None else hidden.view(torch.uint8),
        plan.k_blocks.starts, pairs,
        heads * n_q * n_k if visited.shape[0] > 1 else 0, n_q * n_k if heads > 1 else 0,
        n_k if hidden is not None and hidden.shape[0] > 1 else 0, heads, n_q, n_k,
        1.0 / (scale * LOG2_E),
        N_TILES=tiles, KEYS=TILE, HAS_HIDDEN=hidden is not None, num_warps=1,
    )  # fmt: skip
    of_head = n_q * tiles
    stride_b = heads * of_head if batch > 1 else 0
    return MeanBiases(pairs, stride_b, of_head if heads > 1 else 0, tiles)
