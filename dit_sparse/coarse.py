"""The picture at low resolution as further keys, in the same softmax as those of a plan."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dit_sparse.backend import AttentionOutput
from dit_sparse.grid import TokenLayout
from dit_sparse.plan import BlockPlan, Blocks, Coarse

_CONVERTED = 1 << 24  # elements that are in fp32 at a time, which bounds the memory that it takes


def means(coarse: Coarse, x: Tensor) -> Tensor:
    """`[B, H, N_k, D]` to `[B, H, M, D]`, sums in fp32 (float64 for float64)."""
    sums = torch.promote_types(x.dtype, torch.float32)
    shape = (*x.shape[:2], coarse.size + 1, x.shape[-1])
    total = x.new_zeros(shape, dtype=sums)
    # Sums of one dtype take addends of that dtype only: some tokens are converted at a time.
    few = max(1, _CONVERTED // max(1, x[:, :, :1].numel()))
    for cell, part in zip(coarse.cell.split(few), x.split(few, dim=2), strict=True):
        total.index_add_(2, cell, part.to(sums))
    ones = torch.ones_like(coarse.cell, dtype=sums)
    count = ones.new_zeros(coarse.size + 1).index_add_(0, coarse.cell, ones)
    return (total[:, :, :-1] / count[:-1, None]).to(x.dtype)


def in_plan_order(plan: BlockPlan) -> BlockPlan:
    """The plan for tensors that stand in its order already."""
    coarse = plan.coarse
    if coarse is not None and plan.order is not None:
        coarse = replace(coarse, cell=coarse.cell[plan.order.index])
    return replace(plan, order=None, coarse=coarse)


def squares(layout: TokenLayout, size: int, block: int, device: torch.device) -> Coarse:
    """Cells of `size` x `size` tokens of every frame, all read by every query of the picture.

    Where they do not divide the frame those at its far borders are smaller. Text and reference
    images do not read them.

    Args:
        block: tokens a block holds at most.
    """
    frames, height, width = layout.grid.shape
    rows, columns = -(-height // size), -(-width // size)
    frame = torch.arange(frames, device=device)[:, None, None] * (rows * columns)
    row = torch.arange(height, device=device)[:, None] // size * columns
    inside = (frame + row + torch.arange(width, device=device) // size).flatten()
    count = frames * rows * columns
    cell = torch.full((layout.length,), count, dtype=torch.int64, device=device)
    first, last = layout.grid_start, layout.grid_start + len(inside)
    cell[first:last] = inside
    queries = Blocks.of_runs([first, len(inside), layout.length - last], block, device)
    keys = Blocks.uniform(count, block, device)
    start = queries.starts[:-1]
    reads = (start >= first) & (start < last)
    mask = reads[None, None, :, None].expand(1, 1, queries.n, keys.n)
    return Coarse(cell, count, BlockPlan.from_mask(mask, queries, keys))


def one_softmax(one: AttentionOutput, other: AttentionOutput) -> AttentionOutput:
    """Attention to the keys of both, which each has attended to alone."""
    lse = torch.logaddexp(one.lse, other.lse)
    seen = lse.masked_fill(lse == -torch.inf, 0.0)  # where neither read a key: 0, not NaN
    parts = ((part.lse - seen).exp()[..., None] * part.out for part in (one, other))
    return AttentionOutput(sum(parts, torch.zeros((), device=lse.device)).to(one.out.dtype), lse)
