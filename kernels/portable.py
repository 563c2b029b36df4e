"""Launches the portable kernel: any GPU that Triton knows, any head dim, boxes and disks."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from dit_sparse.backend import AttentionOutput
from dit_sparse.kernels._portable import _portable_fwd
from dit_sparse.kernels.launch import Launch, TensorDescriptor
from dit_sparse.kernels.launch import launch as launch_kernel
from dit_sparse.kernels.longest_first import longest_first
from dit_sparse.kernels.tiles import Tile
from dit_sparse.plan import BlockPlan

LOG2_E = 1.4426950408889634

Part = Literal["all", "partial", "added", "repair", "repair full"]


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    tile: Tile,
    result: AttentionOutput,
    *,
    part: Part = "all",
) -> Launch:
    """Writes `result`, or what another kernel has left of it.

    Args:
        q: `[B, H, N_q, D]` in the caller's order, unit stride along D.
        k, v: in plan order, unit stride along D; each of their heads is for as many of q.
        part: `"all"`; `"partial"` where `result` already holds the full entries and the partial
            ones are added to it; `"added"` where it holds what other lists read and all entries
            are added to it; `"repair"` to compute query blocks with an infinite LSE in
            `result` again; `"repair full"` to do so from their full entries alone.
    """
    out, lse = result
    batch, heads, n_queries, head_dim = q.shape
    value_dim = v.shape[-1]
    block_d, block_dv = padded(head_dim), padded(value_dim)
    starts, lengths = plan.spans
    order = starts if plan.order is None else plan.order.index
    queue = longest_first(plan, batch, heads) if part == "all" else None
    masks, words = plan.predicate, plan.words
    if part == "repair full":
        masks = words = None
    lower, upper, above, below = masks.operands if masks else (starts,) * 4
    queries = min(tile.queries, plan.q_blocks.size)
    tma = tile.tma and TensorDescriptor is not None and _describable(k) and _describable(v)
    arguments = (
        q, k, v,
        TensorDescriptor.from_tensor(k, [1, 1, tile.keys, block_d]) if tma else None,
        TensorDescriptor.from_tensor(v, [1, 1, tile.keys, block_dv]) if tma else None,
        out, lse,
        plan.offsets, plan.full, plan.partial, starts, lengths, plan.q_blocks.starts, order,
        starts if queue is None else queue, lower, upper, above, below,
        starts if words is None else words, starts if plan.bias is None else plan.bias,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        *list_strides(plan),
        order.stride(0) if order.ndim == 2 else 0,
        0 if lower.shape[0] == 1 else lower.stride(0),
        heads, heads // k.shape[1], plan.q_blocks.n, n_queries, k.shape[2],
        scale * LOG2_E, masks.guard if masks else 0,
    )  # fmt: skip
    constants = {
        "D": head_dim,
        "DV": value_dim,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "BLOCK_M": queries,
        "PARTS": plan.q_blocks.size // queries,
        "BLOCK_N": tile.keys,
        "SUB": plan.k_blocks.size // tile.keys,
        "FULL": part != "partial",
        "ADD": part in ("partial", "added"),
        "RAGGED": plan.k_blocks.ragged,
        "HAS_BOX": masks is not None or words is not None,
        "DISK": plan.disk is not None,
        "HAS_WORDS": words is not None,
        "HAS_BIAS": plan.bias is not None,
        "HAS_ORDER": plan.order is not None,
        "TMA": tma,
        "REPAIR": part in ("repair", "repair full"),
        "QUEUED": queue is not None,
    }
    grid = (batch * heads * plan.q_blocks.n * constants["PARTS"], 1, 1)
    return launch_kernel(
        _portable_fwd, grid, arguments, constants, warps=tile.warps, stages=tile.stages
    )


def padded(dim: int) -> int:
    """A head dim as the kernels hold it: a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def list_strides(plan: BlockPlan) -> tuple[Any, Any]:
    """Strides of the plan's rows along batch and heads, 0 where they are shared."""
    batch, heads, _ = plan.offsets.shape
    return (
        0 if batch == 1 else plan.offsets.stride(0),
        0 if heads == 1 else plan.offsets.stride(1),
    )


def _describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can address this tensor: 16-byte base and strides."""
    size = x.element_size()
    aligned = all(s > 0 and s * size % 16 == 0 for s in x.stride()[:-1])
    return aligned and x.data_ptr() % 16 == 0
