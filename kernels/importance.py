"""The highest weight between sampled queries and keys of every pair of blocks."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from dit_sparse.kernels._importance import _importance_fwd
from dit_sparse.kernels.portable import LOG2_E, padded

_PER_PROCESSOR = 2  # programs, each of which keeps the scores of a tile of queries


def sampled_maximum(
    queries: Tensor,
    keys: Tensor,
    count: int,
    *,
    scale: float,
    softmax: bool,
    hidden: Tensor | None = None,
) -> Tensor:
    """fp32 `[B, H, n, n]`: per pair of blocks the highest weight, not normalised by row.

    Args:
        queries, keys: `[B, H, n * count, D]`, contiguous; the samples of a block lie together.
        count: samples of a block, a power of two from 1 to 64.
        scale: factor of the scores.
        softmax: weights are those of the softmax over all sampled keys; otherwise they are relative
            to the query's highest score.
        hidden: bool `[1 or B, n]`, key blocks that are not there.
    """
    batch, heads, total, dim = queries.shape
    n = total // count
    importance = queries.new_empty(batch, heads, n, n, dtype=torch.float32)
    rows, columns = (128, 64) if queries.element_size() == 2 else (64, 64)
    tiles = batch * heads * -(-total // rows)
    programs = min(tiles, _PER_PROCESSOR * processors(queries.device))
    best = queries.new_empty(programs, n * rows, dtype=torch.float32)
    _importance_fwd[(programs,)](
        queries, keys, importance if hidden is None else hidden.view(torch.uint8), best, importance,
        n if hidden is not None and hidden.shape[0] > 1 else 0, heads, n, tiles, n * rows,
        scale * LOG2_E,
        D=dim, BLOCK_D=padded(dim), ROWS=rows, BLOCK_N=columns, COUNT=count, CHUNK=32,
        SOFTMAX=softmax, HAS_HIDDEN=hidden is not None, num_warps=8 if rows == 128 else 4,
        num_stages=2,
    )  # fmt: skip
    return importance


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, or as many as tests need."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count
