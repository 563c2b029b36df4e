"""Memory for what attention writes."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.backend import AttentionOutput


def empty_result(q: Tensor, value_dim: int) -> AttentionOutput:
    """Where values and the log-sum-exp of queries `[B, H, N, D]` go.

    Values lie in the memory order of q, so that [B, N, H, D] models reshape them for free.
    """
    batch, heads, tokens, dim = q.shape
    alike = value_dim == dim
    out = torch.empty_like(q) if alike else q.new_empty(batch, heads, tokens, value_dim)
    # With sizes from a slice of the shape the host takes three times as long.
    sizes, strides = (batch, heads, tokens), (heads * tokens, tokens, 1)
    lse = torch.empty_strided(sizes, strides, dtype=torch.float32, device=q.device)
    return AttentionOutput(out, lse)
