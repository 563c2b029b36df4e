"""Adds a tail of block means, with a slope for all of them or without, to the result for what a
plan lists.

A pass of its own over the queries, behind the kernels for exact entries: in their loop the means
cost every block a bias.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_sparse.backend import AttentionOutput
from dit_sparse.kernels._tail import _tail_bias_fwd, _tail_fwd
from dit_sparse.kernels.launch import Launch, TensorDescriptor
from dit_sparse.kernels.launch import launch as launch_kernel
from dit_sparse.kernels.portable import LOG2_E, padded
from dit_sparse.plan import BlockPlan


class Tile(NamedTuple):
    """What a program works in.

    Args:
        means: in one product.
        stages: steps of the loop whose means are on their way or read.
        registers: of a thread at most; with 128 two programs share a multiprocessor.
    """

    means: int
    warps: int
    stages: int
    registers: int | None


def runs(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> bool:
    """Whether the plan has a tail of means, with a slope for all of them or without, and its
    tensors can stand in one buffer, of rows that a descriptor can address."""
    alike = q.shape == k.shape == v.shape and plan.q_blocks.size == plan.k_blocks.size
    whole = q.shape[-1] * q.element_size() % 16 == 0
    return alike and whole and plan.tail in ("zeroth", "first")


def has_slope(plan: BlockPlan) -> bool:
    """Whether `launch` needs a slope."""
    return plan.tail == "first"


def launch(
    q: Tensor,
    means: Tensor,
    plan: BlockPlan,
    scale: float,
    result: AttentionOutput,
    slope: Tensor | None = None,
) -> Launch:
    """Goes on from `result`, which holds the softmax over the plan's exact entries.

    Args:
        q: `[B, H, N, D]` in plan order, unit stride along D.
        means: `[2, B, H, n, D]`, of key blocks of k and of v, see `permute.gather_with_means`.
        slope: see `pool.slope`; `None` for a tail of zeroth order.
    """
    out, lse = result
    batch, heads, n_queries, dim = q.shape
    blocks, n_blocks, width = plan.k_blocks, plan.q_blocks.n, padded(dim)
    order = blocks.starts if plan.order is None else plan.order.index
    tile = choose_tile(width)
    described = _described(means, [2 * batch * heads, blocks.n, dim], [1, tile.means, width])
    biases = bias_of(plan, tile)
    of_batch, of_heads, _, room = biases.shape
    described_bias = TensorDescriptor(
        biases, [of_batch * of_heads * n_blocks, room], [room, 1], [1, tile.means]
    )
    arguments = (
        q, described, described_bias,
        None if slope is None else _described(slope, [batch * heads, dim, dim], [1, width, width]),
        out, lse, plan.q_blocks.starts, order,
        *q.stride()[:3], *out.stride()[:3], order.stride(0) if order.ndim == 2 else 0,
        of_heads * n_blocks if of_batch > 1 else 0, n_blocks if of_heads > 1 else 0,
        batch * heads, heads, n_blocks, blocks.n, n_queries, scale, scale * LOG2_E,
    )  # fmt: skip
    constants = {
        "D": dim,
        "BLOCK_D": width,
        "BLOCK_M": plan.q_blocks.size,
        "BLOCK_N": tile.means,
        "HAS_ORDER": plan.order is not None,
        "SLOPE": slope is not None,
    }
    return launch_kernel(
        _tail_fwd, (batch * heads * n_blocks, 1, 1), arguments, constants,
        warps=tile.warps, stages=tile.stages, registers=tile.registers,
    )  # fmt: skip


def bias_of(plan: BlockPlan, tile: Tile) -> Tensor:
    """What `_tail_bias_fwd` makes of a plan: `[1 or B, 1 or H, n_q, n_k and up to whole tiles]`, in
    fp32: a tile is 128 bytes long or several times that. Shorter ones, one behind the other in
    shared memory, would not begin where descriptors may load to, and Triton 3.6 does not see it."""
    visited, hidden = plan.visited, plan.hidden
    batch, heads, n_q, n_k = visited.shape
    of_batch = hidden is not None and hidden.shape[0] > 1
    if of_batch and hidden is not None:
        batch = hidden.shape[0]
    width = -(-n_k // tile.means) * tile.means
    bias = torch.empty(batch, heads, n_q, width, dtype=torch.float32, device=plan.device)
    seen = visited.view(torch.uint8)
    arguments = (
        seen, seen if hidden is None else hidden.view(torch.uint8), plan.k_blocks.starts, bias,
        visited.stride(0) if visited.shape[0] > 1 else 0, visited.stride(1),
        n_k if of_batch else 0, heads, n_q, n_k, width,
    )  # fmt: skip
    constants = {"HAS_HIDDEN": hidden is not None, "BLOCK": 512}
    launch_kernel(
        _tail_bias_fwd, (batch * heads * n_q, 1, 1), arguments, constants,
        warps=4, stages=1, registers=None,
    )  # fmt: skip
    return bias


def _described(matrices: Tensor, shape: list[int], box: list[int]) -> Any:
    """A descriptor of contiguous matrices, one below the other. The tensor itself is its base,
    which repeated launches look for."""
    return TensorDescriptor(matrices, shape, [shape[1] * shape[2], shape[2], 1], box)


def choose_tile(width: int) -> Tile:
    """For rows of padded width; two programs share the registers of a multiprocessor, and what it
    has of shared memory."""
    return Tile(64 if width <= 64 else 32, 8, 4, 128)
