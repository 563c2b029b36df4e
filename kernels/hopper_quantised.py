"""Launches the 8-bit Hopper kernel, for a plan's full entries or its partial ones."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from dit_sparse.backend import AttentionOutput
from dit_sparse.kernels import hopper
from dit_sparse.kernels._hopper_quantised import _quantised_fwd_hopper
from dit_sparse.kernels.launch import Launch, TensorDescriptor, launch_specialised
from dit_sparse.kernels.longest_first import longest_first
from dit_sparse.kernels.portable import LOG2_E, list_strides, padded
from dit_sparse.kernels.quantise import Quantised
from dit_sparse.plan import BlockPlan
from dit_sparse.predicate import BoxPredicate


def launch(
    quantised: Quantised,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    result: AttentionOutput,
    *,
    partial: bool = False,
) -> Launch | None:
    """Writes `result`; `None`, and nothing written, if the strides of v do not allow it or Triton
    compiled the kernel badly.

    Args:
        quantised: queries and keys, and the values unless they are read from `v`.
        v: `[B, H, N, D]` in plan order.
        partial: whether to add the partial entries, masked by boxes, to `result`; otherwise
            `result` gets the full entries.
    """
    vm = None
    if quantised.v is None:
        vm = hopper.Matrix.of(v)
        if vm is None or ((plan.k_blocks.ragged or partial) and not vm.ends_in_itself):
            return None
    box = plan.box if partial else None
    run = functools.partial(_launch, quantised, v, vm, plan, scale, result, box)
    return hopper.with_scratch(run)


def _launch(
    quantised: Quantised,
    v: Tensor,
    vm: hopper.Matrix | None,
    plan: BlockPlan,
    scale: float,
    result: AttentionOutput,
    box: BoxPredicate | None,
) -> Launch | None:
    out, lse = result
    batch, heads, n_queries, head_dim = out.shape
    q, k, width = quantised.q, quantised.k, quantised.q.shape[-1]
    keys = plan.k_blocks.size
    starts, counts = plan.spans
    rows = plan.masked_rows if box else plan.q_blocks.starts[:-1]
    picture = range(len(rows)) if box else plan.q_blocks.picture or range(len(rows))
    order = starts if plan.order is None else plan.order.index
    queue = longest_first(plan, batch, heads, "partial" if box else "full")
    if vm is None:
        assert quantised.v is not None
        rows_of_head = plan.k_blocks.n * width
        v_desc = _rows(quantised.v, [width, keys])
        v_origin = (heads * rows_of_head, rows_of_head, 0)
    else:
        v_desc, v_origin = vm.describe([keys, padded(head_dim)]), vm.origin
    arguments = (
        q, _rows(k, [keys, width]), v_desc,
        *(_coordinates(plan) if box else (None, None)),
        out, lse, quantised.q_step, quantised.k_step, quantised.centres, quantised.excess,
        quantised.shift,
        plan.offsets, plan.full, plan.partial, plan.indices, starts, counts,
        plan.q_blocks.starts, rows, order, starts if queue is None else queue,
        box.lower if box else starts, box.upper if box else starts,
        q.shape[:-1].numel(), k.shape[2] * keys, *v_origin, *out.stride()[:3],
        *list_strides(plan), order.stride(0) if order.ndim == 2 else 0,
        box.lower.stride(0) if box and box.lower.shape[0] > 1 else 0,
        heads, plan.q_blocks.n, len(rows), len(rows) - len(picture), picture.start,
        plan.k_blocks.n, n_queries, scale * LOG2_E,
        box.guard if box else 0,
    )  # fmt: skip
    constants = {
        "D": head_dim,
        "BLOCK_D": width,
        "BLOCK_M": plan.q_blocks.size,
        "BLOCK_N": keys,
        "RAGGED": plan.k_blocks.ragged,
        "HAS_ORDER": plan.order is not None,
        "PARTIAL": box is not None,
        "V_8BIT": vm is None,
        # Each block's values are added up apart and then in fp32, since 8-bit products are added in
        # 14 bits. Not for partial entries, which are few and have no registers left.
        "FRESH": vm is None and box is None,
        "QUEUED": queue is not None,
    }
    grid = (batch * heads * len(rows), 1, 1)
    return launch_specialised(_quantised_fwd_hopper, grid, arguments, constants, warps=4, stages=2)


def _coordinates(plan: BlockPlan) -> Any:
    """Descriptors of the keys' packed coordinates, a row for each block."""
    size = plan.k_blocks.size
    return (
        TensorDescriptor(rows, [plan.k_blocks.n, size], [size, 1], [1, size])
        for rows in plan.box_by_block
    )


def _rows(x: Tensor, block: list[int]) -> TensorDescriptor:
    """A contiguous tensor as the matrix of its rows; the tensor itself is the base, which repeated
    launches look for."""
    width = x.shape[-1]
    return TensorDescriptor(x, [x.numel() // width, width], [width, 1], block)
