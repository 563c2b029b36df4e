"""The highest weight between sampled queries and keys of every pair of blocks."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from dit_sparse.kernels._importance import _importance_fwd, _take_fwd
from dit_sparse.kernels.architecture import architecture, follows
from dit_sparse.kernels.launch import TensorDescriptor, device_of
from dit_sparse.kernels.portable import LOG2_E, padded

_PER_PROCESSOR = 3  # programs, each of which keeps the scores of a tile of queries
_COLUMNS, STAGES = 64, 2  # keys of a tile, and tiles in flight
CHUNK = 32  # key blocks whose weights are written at a time
#: Of a thread, where so many programs of 256 threads can share 65,536.
REGISTERS = 80
_LEAST = 8  # samples of a block; with fewer three programs take more shared memory than there is


def take(q: Tensor, k: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of q and of k `[B, H, m, D]` in one launch.

    Args:
        q, k: `[B, H, N, D]` of one dtype, unit stride along D.
        tokens: int64 `[2, H, m]`, contiguous, positions in q and in k.
    """
    batch, heads, _, dim = q.shape
    taken, rows = tokens.shape[-1], 64
    out = q.new_empty(2, batch, heads, taken, dim)
    with device_of(q):
        _take_fwd[(-(-taken // rows), batch * heads, 2)](
            q, k, out, tokens, *q.stride()[:3], *k.stride()[:3], heads, taken,
            D=dim, BLOCK_D=padded(dim), ROWS=rows, num_warps=4,
        )  # fmt: skip
    return out[0], out[1]


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
    rows = 128 if queries.element_size() == 2 else 64
    tiles = batch * heads * -(-total // rows)
    programs = min(tiles, _PER_PROCESSOR * processors(queries.device))
    best = queries.new_empty(programs, n * rows, dtype=torch.float32)
    tma = _described(queries)
    columns, dim_padded = _COLUMNS, padded(dim)
    if tma:
        shape = [batch * heads * total, dim]
        keys = TensorDescriptor(keys, shape, [dim, 1], [columns, dim_padded])
    bounded = _bounded(queries, count)
    with device_of(queries):
        _importance_fwd[(programs,)](
            queries, keys, importance if hidden is None else hidden.view(torch.uint8), best,
            importance, n if hidden is not None and hidden.shape[0] > 1 else 0, heads, n, tiles,
            n * rows, scale * LOG2_E,
            D=dim, BLOCK_D=dim_padded, ROWS=rows, BLOCK_N=columns, COUNT=count, CHUNK=CHUNK,
            SOFTMAX=softmax, TMA=tma, WHOLE=total % columns == 0, HAS_HIDDEN=hidden is not None,
            num_warps=8 if rows == 128 else 4, num_stages=STAGES, **bounded,
        )  # fmt: skip
    return importance


def _bounded(x: Tensor, count: int) -> dict[str, int]:
    """The option that bounds registers, where it lets more programs run at a time."""
    roomy = x.is_cuda and architecture(x.device) == "sm_90" and x.element_size() == 2
    return {"maxnreg": REGISTERS} if roomy and x.shape[-1] <= 128 and count >= _LEAST else {}


def _described(x: Tensor) -> bool:
    """Whether a descriptor can be made of its rows, for a GPU that loads through one."""
    if TensorDescriptor is None or x.shape[-1] * x.element_size() % 16:
        return False
    return not x.is_cuda or follows(architecture(x.device), "sm_90")


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, or as many as tests need."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count
