"""Puts rows into a permutation's order, near copy bandwidth for any strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_sparse.grid import Permutation
from dit_sparse.kernels._permute import _permute_blocks, _permute_rows
from dit_sparse.kernels.launch import Launch, launch
from dit_sparse.plan import BlockPlan

_ROWS, _WARPS = 32, 4  # of a program that forms means


def permute(tensors: Sequence[Tensor], order: Permutation) -> list[Tensor]:
    """`order(x)` of one to three tensors in one launch.

    Indexing in PyTorch addresses element by element, at a quarter of the bandwidth.

    Args:
        tensors: `[B, H, N, D]` of one dtype, unit stride along D; several of one shape.

    Returns:
        Contiguous tensors.
    """
    if len({t.shape for t in tensors}) > 1:  # values of another head dim
        return [permute([t], order)[0] for t in tensors]
    out = empty(tensors)
    gather(tensors, order, out)
    return list(out.unbind())


def gather(
    tensors: Sequence[Tensor],
    order: Permutation,
    out: Tensor,
    lengths: tuple[Tensor, Tensor] | None = None,
) -> Launch:
    """`permute` of tensors of one shape into `out` `[1 to 3, B, H, N, D]`, see `empty`.

    Args:
        tensors, order: see `permute`.
        lengths: where the lengths of the first tensor's rows go, in their new order, and of the
            longest of the second's; see `norms.empty`.
    """
    batch, heads, tokens, dim = tensors[0].shape
    index = order.index
    x0, x1, x2 = (tensors[min(i, len(tensors) - 1)] for i in range(3))
    width = 1 << (dim - 1).bit_length()
    rows = max(1, 8192 // width)
    arguments = (
        x0, x1, x2, out, index, *(lengths or (out, out)),
        *x0.stride()[:3], *x1.stride()[:3], *x2.stride()[:3],
        index.stride(0) if index.ndim == 2 else 0, heads, tokens,
    )  # fmt: skip
    grid = (-(-tokens // rows), batch * heads, len(tensors))
    constants = {"D": dim, "BLOCK_D": width, "BLOCK_N": rows, "NORMS": lengths is not None}
    return launch(_permute_rows, grid, arguments, constants, warps=4, stages=3)


def gather_with_means(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    means: Tensor,
    *,
    out: Tensor | None = None,
    lengths: tuple[Tensor, Tensor] | None = None,
    centres: Tensor | None = None,
) -> Launch:
    """Means of the plan's key blocks, and on the way whatever else q, k and v are read for.

    Args:
        q, k, v: of one shape, in the caller's order, unit stride along D.
        plan: with key blocks that cut the queries too.
        means: `[2, B, H, n, D]`, gets those of k and of v, summed in fp32; zeros for hidden blocks.
        out: `[3, B, H, N, D]`, gets q, k and v in plan order.
        lengths: of the rows of q, in plan order, and of the longest of k; see `norms.empty`.
        centres: fp32 `[B, H, n, D]`, gets the means of k.
    """
    batch, heads, tokens, dim = q.shape
    blocks, hidden = plan.k_blocks, plan.hidden
    index = blocks.starts if plan.order is None else plan.order.index
    skipped = 1 if out is None and lengths is None else 0
    arguments = (
        q, k, v, means if out is None else out, means, means if centres is None else centres,
        index, blocks.starts, means if hidden is None else hidden.view(torch.uint8),
        *(lengths or (means, means)),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        index.stride(0) if index.ndim == 2 else 0,
        blocks.n if hidden is not None and hidden.shape[0] > 1 else 0,
        heads, tokens, blocks.n,
    )  # fmt: skip
    constants = {
        "D": dim,
        "BLOCK_D": 1 << (dim - 1).bit_length(),
        "SIZE": blocks.size,
        "ROWS": min(_ROWS, blocks.size),
        "SKIPPED": skipped,
        "MOVE": out is not None,
        "HAS_ORDER": plan.order is not None,
        "HAS_HIDDEN": hidden is not None,
        "NORMS": lengths is not None,
        "CENTRES": centres is not None,
    }
    grid = (batch * heads, blocks.n, 3 - skipped)
    return launch(_permute_blocks, grid, arguments, constants, warps=_WARPS, stages=1)


def empty(tensors: Sequence[Tensor]) -> Tensor:
    """Where `gather` puts tensors of one shape."""
    first = tensors[0]
    return first.new_empty((len(tensors), *first.shape))
