"""Puts rows into a permutation's order, near copy bandwidth for any strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_sparse.grid import Permutation
from dit_sparse.kernels._permute import _permute_rows
from dit_sparse.kernels.launch import Launch, launch


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


def empty(tensors: Sequence[Tensor]) -> Tensor:
    """Where `gather` puts tensors of one shape."""
    first = tensors[0]
    return torch.empty((len(tensors), *first.shape), dtype=first.dtype, device=first.device)
