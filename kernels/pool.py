"""Summaries of blocks of tokens, each token read once: means, pooled rows, covariances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.grid import Permutation
from dit_sparse.kernels._pool import _covariance_fwd, _means_fwd
from dit_sparse.kernels.launch import device_of
from dit_sparse.kernels.portable import padded
from dit_sparse.plan import Blocks

# Columns of a program that forms means: of pooled rows too, which it writes, fewer are faster
# (0.15 and 0.20 ms for k and v of 32,768 tokens and 12 heads [H200]).
_COLUMNS, _POOLED_COLUMNS, _WARPS = 64, 32, 4
_CHUNKS = 16  # partial sums of a head's covariance: enough programs to fill a GPU, few matrices


@dataclass(frozen=True)
class Means:
    """Pooled rows of one tensor.

    Args:
        pooled: `[B, H, R, D]`, for every factor g in turn those of every block: `ceil(size / g)`,
            whatever its length, or more, see `pool_all`.
        bias: fp32 `[R]`, log2 of the tokens of every pooled row, -inf for rows without any.
        blocks: fp32 `[B, H, n, D]`, the mean of every block.
    """

    pooled: Tensor
    bias: Tensor
    blocks: Tensor


def pool(
    x: Tensor,
    blocks: Blocks,
    *,
    factors: tuple[int, ...] = (),
    means: bool = True,
    order: Permutation | None = None,
) -> Means:
    """`pool_all` of one tensor, with the means of its blocks in fp32 alone."""
    return pool_all([x], blocks, factors=factors, means=means, order=order)[0]


def pool_all(
    tensors: Sequence[Tensor],
    blocks: Blocks,
    *,
    factors: tuple[int, ...] = (),
    means: bool = False,
    least: int = 1,
    order: Permutation | None = None,
) -> list[Means]:
    """Means over blocks and over groups of consecutive tokens in them, summed in fp32.

    What is not asked for is empty.

    Args:
        tensors: one or two `[B, H, N, D]` of one dtype, unit stride along D; two of one shape are
            read in one launch.
        blocks: cut of the N tokens; a size of a power of two.
        factors: pool factors, powers of two from 2 to 128.
        means: whether to make the blocks' means in fp32.
        least: pooled rows that a block has at least, a power of two: each group stands in several
            where it has fewer, and groups without tokens repeat the last one. Without biases.
        order: leads from the order of the tensors to that of the blocks.
    """
    if len({x.shape for x in tensors}) > 1:
        return [_pool([x], blocks, factors, means, least, order)[0] for x in tensors]
    return _pool(tensors, blocks, factors, means, least, order)


def _pool(
    tensors: Sequence[Tensor],
    blocks: Blocks,
    factors: tuple[int, ...],
    means: bool,
    least: int,
    order: Permutation | None,
) -> list[Means]:
    x0, x1 = tensors[0], tensors[-1]
    batch, heads, _, dim = x0.shape
    lead = (len(tensors), batch, heads)
    rows = sum(blocks.n * max(-(-blocks.size // factor), least) for factor in factors)
    pooled = x0.new_empty(*lead, rows, dim)
    bias = x0.new_empty(rows if least == 1 else 0, dtype=torch.float32)
    of_blocks = x0.new_empty(*lead, blocks.n if means else 0, dim, dtype=torch.float32)
    index = blocks.starts if order is None else order.index
    columns = min(padded(dim), _POOLED_COLUMNS if factors else _COLUMNS)
    with device_of(x0):
        _means_fwd[(batch * heads * blocks.n * -(-dim // columns), len(tensors))](
            x0, x1, pooled, bias, of_blocks, blocks.starts, index,
            *x0.stride()[:3], *x1.stride()[:3], index.stride(0) if index.ndim == 2 else 0,
            heads, batch * heads, blocks.n, rows,
            D=dim, COLUMNS=columns, SIZE=blocks.size, LOG_SIZE=blocks.size.bit_length() - 1,
            FACTORS=sum(factors), HAS_ORDER=order is not None, MEANS=means, LEAST=least,
            num_warps=_WARPS if blocks.size <= 128 else 8,
        )  # fmt: skip
    return [Means(pooled[i], bias, of_blocks[i]) for i in range(len(tensors))]


def slope(
    k: Tensor, v: Tensor, blocks: Blocks, means: Tensor, hidden: Tensor | None = None
) -> Tensor:
    """Mean key-value covariance per token, in the dtype of k: `[B, H, D, D_v]`; the arguments are
    those of `covariance_sum`."""
    total = covariance_sum(k, v, blocks, means, hidden)
    tokens: Tensor | int = k.shape[2]
    if hidden is not None:
        tokens = (blocks.lengths * ~hidden).sum(-1).view(-1, 1, 1, 1).clamp(min=1)
    return torch.div(total, tokens, out=torch.empty_like(total, dtype=k.dtype))


def covariance_sum(
    k: Tensor, v: Tensor, blocks: Blocks, means: Tensor, hidden: Tensor | None = None
) -> Tensor:
    """`sum_j H_j` fp32 `[B, H, D, D_v]` over the blocks that are not hidden.

    Takes the memory of at most 16 blocks' covariances, however many blocks there are.

    Args:
        k, v: in the order of the blocks, unit stride along D.
        means: mean keys, fp32 `[B, H, n, D]`.
        hidden: bool `[1 or B, n]`.
    """
    batch, heads = k.shape[:2]
    chunks = min(_CHUNKS, blocks.n)
    parts = k.new_empty(batch, heads, chunks, k.shape[-1], v.shape[-1], dtype=torch.float32)
    _launch(k, v, blocks, means, chunks, hidden=hidden, total=parts)
    return parts.sum(2)


def covariances(k: Tensor, v: Tensor, blocks: Blocks, means: Tensor) -> Tensor:
    """Every H_j divided by the tokens of its block, in the dtype of `k`: `[B, H, n, D, D_v]`."""
    each = k.new_empty(*k.shape[:2], blocks.n, k.shape[-1], v.shape[-1])
    _launch(k, v, blocks, means, blocks.n, each=each)
    return each


def covariance_norms(
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    means: Tensor,
    *,
    centred: bool,
    order: Permutation | None = None,
) -> Tensor:
    """Frobenius norms fp32 `[B, H, n]` of every H_j, or of its deviation from their mean.

    No H_j is stored; their deviations take a second pass over k and v.

    Args:
        order: leads from the order of `k` and `v` to that of the blocks.
    """
    centre = None
    if centred:
        chunks = min(_CHUNKS, blocks.n)
        parts = k.new_empty(*k.shape[:2], chunks, k.shape[-1], v.shape[-1], dtype=torch.float32)
        _launch(k, v, blocks, means, chunks, total=parts, order=order)
        centre = parts.sum(2) / blocks.n
    tiles = -(-v.shape[-1] // _columns(v))
    squares = k.new_empty(*k.shape[:2], blocks.n, tiles, dtype=torch.float32)
    _launch(k, v, blocks, means, blocks.n, centre=centre, squares=squares, order=order)
    return squares.sum(-1).sqrt()


def _columns(v: Tensor) -> int:
    return min(padded(v.shape[-1]), 64)


def _launch(
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    means: Tensor,
    chunks: int,
    *,
    order: Permutation | None = None,
    hidden: Tensor | None = None,
    centre: Tensor | None = None,
    total: Tensor | None = None,
    squares: Tensor | None = None,
    each: Tensor | None = None,
) -> None:
    """Writes those of `total`, `squares` and `each` that are given."""
    batch, heads, _, dim = k.shape
    index = blocks.starts if order is None else order.index
    rows, columns = min(blocks.size, 64), _columns(v)
    with device_of(k):
        _covariance_fwd[(batch * heads * chunks, -(-v.shape[-1] // columns))](
            k, v, means, _or(hidden, k, torch.uint8), _or(centre, k), _or(total, k),
            _or(squares, k), _or(each, k), blocks.starts, index,
            *k.stride()[:3], *v.stride()[:3], index.stride(0) if index.ndim == 2 else 0,
            hidden.stride(0) if hidden is not None and hidden.shape[0] > 1 else 0,
            heads, blocks.n, chunks, -(-blocks.n // chunks),
            D=dim, DV=v.shape[-1], BLOCK_D=padded(dim), COLUMNS=columns, ROWS=rows,
            SUB=blocks.size // rows, HAS_ORDER=order is not None, HAS_HIDDEN=hidden is not None,
            HAS_CENTRE=centre is not None, SUM=total is not None, SQUARES=squares is not None,
            EACH=each is not None, num_warps=8 if padded(dim) > 64 else 4,
        )  # fmt: skip


def _or(tensor: Tensor | None, other: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor, seen as bytes where it is bool, or any other in its place."""
    if tensor is None:
        return other
    return tensor if dtype is None else tensor.view(dtype)
