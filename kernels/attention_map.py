"""Softmax maps reduced to a few numbers per pair of blocks, without the maps."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels._attention_map import _attention_map_fwd
from dit_sparse.kernels.launch import device_of
from dit_sparse.kernels.portable import LOG2_E, padded
from dit_sparse.plan import Blocks

_TILE_BYTES = 1 << 14  # of keys: several fit into the shared memory of any GPU


def block_statistics(
    q: Tensor, k: Tensor, blocks: Blocks, bound: float, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, maxima and counts below `bound` of softmax weights: fp32 `[H, n, n]` each.

    Takes every score twice, first for the softmax of the rows, and keeps none.

    Args:
        q, k: `[H, N, D]` in the order of the blocks, of one dtype of 16 or 32 bits, D at most 256.
        blocks: the cut of queries and of keys.
        bound: weights below it are counted.
        hidden: bool `[n]`, key blocks that are not read: 0 in all three.
    """
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    heads, _, dim = q.shape
    rows, columns = tile(blocks.size, dim, q.element_size())
    parts = -(-blocks.size // rows)
    found = [q.new_empty(heads, blocks.n, parts, blocks.n, dtype=torch.float32) for _ in range(3)]
    with device_of(q):
        _attention_map_fwd[(heads * blocks.n * parts,)](
            q, k, blocks.starts, blocks.starts if hidden is None else hidden.view(torch.uint8),
            *found, *q.stride()[:2], *k.stride()[:2], blocks.n, parts, dim**-0.5 * LOG2_E,
            float(bound),
            D=dim, BLOCK_D=padded(dim), BLOCK_M=rows, BLOCK_N=columns,
            SUB=-(-blocks.size // columns), HAS_HIDDEN=hidden is not None,
            num_warps=8 if rows == 128 else 4, num_stages=2,
        )  # fmt: skip
    sums, maxima, small = found
    return sums.sum(2), maxima.amax(2), small.sum(2)


def tile(size: int, dim: int, element_size: int) -> tuple[int, int]:
    """Queries and keys that a program holds at a time, powers of two; a block may be several.

    Args:
        size: tokens of a block.
        dim: of the heads.
        element_size: bytes of a number.
    """
    within = padded(size)  # also the least that a matrix product takes
    rows = min(within, 128 if element_size == 2 else 64)
    columns = min(within, 64, max(16, _TILE_BYTES // (padded(dim) * element_size)))
    return rows, columns
