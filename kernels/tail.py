"""Adds a tail of block means, with a slope for all of them or without, to the result for what a
plan lists.

A pass of its own over the queries, behind the kernels for exact entries: in their loop the means
cost every block a bias.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.backend import AttentionOutput
from dit_sparse.kernels._tail import _tail_fwd
from dit_sparse.kernels.launch import Launch, TensorDescriptor
from dit_sparse.kernels.launch import launch as launch_kernel
from dit_sparse.kernels.portable import LOG2_E, padded
from dit_sparse.plan import BlockPlan


class Tile(NamedTuple):
    """What a program works in.

    Args:
        means: in one product.
        registers: of a thread at most; with 128 two programs share a multiprocessor.
    """

    means: int
    warps: int
    stages: int
    registers: int | None


def runs(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> bool:
    """Whether the plan has a tail of means, with a slope for all of them or without, and its
    tensors can stand in one buffer."""
    alike = q.shape == k.shape == v.shape and plan.q_blocks.size == plan.k_blocks.size
    return alike and plan.tail in ("zeroth", "first")


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
    visited, hidden = plan.visited, plan.hidden
    blocks = plan.k_blocks
    order = blocks.starts if plan.order is None else plan.order.index
    tile = choose_tile(sloped=slope is not None)
    shape, box = [2 * batch * heads, blocks.n, dim], [1, tile.means, padded(dim)]
    described = TensorDescriptor(means, shape, [blocks.n * dim, dim, 1], box)
    arguments = (
        q, described, means if slope is None else slope, out, lse,
        visited.view(torch.uint8), blocks.starts if hidden is None else hidden.view(torch.uint8),
        blocks.starts, plan.q_blocks.starts, order,
        *q.stride()[:3], *out.stride()[:3],
        visited.stride(0) if visited.shape[0] > 1 else 0,
        visited.stride(1) if visited.shape[1] > 1 else 0,
        blocks.n if hidden is not None and hidden.shape[0] > 1 else 0,
        order.stride(0) if order.ndim == 2 else 0,
        batch * heads, heads, plan.q_blocks.n, blocks.n, n_queries, scale, scale * LOG2_E,
    )  # fmt: skip
    constants = {
        "D": dim,
        "BLOCK_D": padded(dim),
        "BLOCK_M": plan.q_blocks.size,
        "BLOCK_N": tile.means,
        "HAS_HIDDEN": hidden is not None,
        "HAS_ORDER": plan.order is not None,
        "SLOPE": slope is not None,
    }
    grid = (batch * heads * plan.q_blocks.n, 1, 1)
    return launch_kernel(
        _tail_fwd, grid, arguments, constants,
        warps=tile.warps, stages=tile.stages, registers=tile.registers,
    )  # fmt: skip


def choose_tile(*, sloped: bool) -> Tile:
    """The product with a slope takes the registers of a second program."""
    return Tile(64, 8, 2, None) if sloped else Tile(32, 8, 2, 128)
