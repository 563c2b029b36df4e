"""Bounds of attention scores from the lengths of queries and keys, in one pass over both."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels._norms import _norms


def norms(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean lengths of the queries, and of the longest key of each head.

    By Cauchy and Schwarz no score of query i is above the product of the two.

    Args:
        q, k: `[B, H, N, D]` of one head dim, unit stride along D.

    Returns:
        float32 `[B, H, N_q]` and `[B, H]`.
    """
    batch, heads, n_queries, dim = q.shape
    n_keys = k.shape[2]
    lengths = q.new_empty(batch, heads, n_queries, dtype=torch.float32)
    longest = q.new_zeros(batch, heads, dtype=torch.float32)
    width = 1 << (dim - 1).bit_length()
    rows = max(1, 8192 // width)
    _norms[(-(-max(n_queries, n_keys) // rows), batch * heads, 2)](
        q, k, lengths, longest,
        *q.stride()[:3], *k.stride()[:3], heads, n_queries, n_keys,
        D=dim, BLOCK_D=width, BLOCK_N=rows,
    )  # fmt: skip
    return lengths, longest
