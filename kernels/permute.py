"""Puts rows into a permutation's order, near copy bandwidth for any strides."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dit_sparse.grid import Permutation
from dit_sparse.kernels._permute import _permute_rows


def permute(x: Tensor, order: Permutation) -> Tensor:
    """`order(x)` for `x` `[B, H, N, D]` with unit stride along D, as a contiguous tensor.

    About five times faster than indexing in PyTorch, which addresses element by element.
    """
    batch, heads, tokens, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    index = order.index
    rows = max(1, 8192 // triton.next_power_of_2(dim))
    _permute_rows[(triton.cdiv(tokens, rows), batch * heads)](
        x, out, index,
        *x.stride()[:3], *out.stride()[:3],
        index.stride(0) if index.ndim == 2 else 0, heads, tokens,
        D=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK_N=rows,
    )  # fmt: skip
    return out
