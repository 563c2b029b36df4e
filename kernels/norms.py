"""Bounds of attention scores: lengths of the queries, and of the longest key.

By Cauchy and Schwarz no score of query i is above the product of the two. What puts rows into plan
order measures them on the way; this is for rows that are in order already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels._norms import _norms
from dit_sparse.kernels.launch import Launch, launch


def empty(q: Tensor) -> tuple[Tensor, Tensor]:
    """Where lengths of queries `[B, H, N, D]` go, float32 `[B, H, N]`, and of the longest key of
    each head, `[B, H]`: zeros, which kernels raise."""
    batch, heads, tokens, _ = q.shape
    lengths = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    return lengths, torch.zeros(batch, heads, dtype=torch.float32, device=q.device)


def measure(q: Tensor, k: Tensor, into: tuple[Tensor, Tensor]) -> Launch:
    """Writes Euclidean lengths, in one pass over q and k.

    Args:
        q, k: `[B, H, N, D]` of one head dim, unit stride along D; each head of k is for as many of
            q.
        into: see `empty`.
    """
    batch, heads, n_queries, dim = q.shape
    n_keys = k.shape[2]
    width = 1 << (dim - 1).bit_length()
    rows = max(1, 8192 // width)
    arguments = (q, k, *into, *q.stride()[:3], *k.stride()[:3])
    arguments += (heads, heads // k.shape[1], n_queries, n_keys)
    grid = (-(-max(n_queries, n_keys) // rows), batch * heads, 2)
    constants = {"D": dim, "BLOCK_D": width, "BLOCK_N": rows}
    return launch(_norms, grid, arguments, constants, warps=4, stages=3)
