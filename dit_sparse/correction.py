"""What stands for the attention mass that was not computed exactly, as definitions in PyTorch.

A block j of keys is replaced by its mean key and value, counted as often as it has tokens, and
Taylor's first term adds what its key-value covariance H_j = sum (k - mean k)^T v says (PISA,
arXiv 2602.01077): per block exactly, or for all blocks together by the mean covariance per token.
The kernels of `kernels/pool.py` compute the same on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.plan import Blocks

_TOGETHER = 16  # blocks whose covariances are formed at a time


class BlockMeans(NamedTuple):
    """Mean key `[..., n, D]` and mean value `[..., n, D_v]` of every block."""

    keys: Tensor
    values: Tensor


def block_means(x: Tensor, blocks: Blocks) -> Tensor:
    """Means over the tokens of every block.

    Args:
        x: `[..., N, D]` in plan order, fp32 or fp64 (a sum over bf16 would lose digits).

    Returns:
        `[..., n, D]`.
    """
    sums = x.new_zeros(*x.shape[:-2], blocks.n, x.shape[-1])
    return sums.index_add_(-2, blocks.of_token, x) / blocks.lengths[:, None].to(x.dtype)


def covariance_sum(k: Tensor, v: Tensor, blocks: Blocks, weights: Tensor | None = None) -> Tensor:
    """`sum_j w_j H_j` `[..., D, D_v]`, no single H_j formed.

    Keys are centred before they are multiplied: `sum k^T v - B mean^T mean` would lose digits to a
    common offset of the keys, which the softmax does not see.

    Args:
        k, v: `[..., N, D]` and `[..., N, D_v]` in plan order, fp32 or fp64.
        weights: `[n]`, factors of the blocks; all 1 by default. Blocks of weight 0 are left out,
            whatever they hold.
    """
    if weights is not None:
        left_out = (weights == 0)[blocks.of_token, None]
        k, v = k.masked_fill(left_out, 0.0), v.masked_fill(left_out, 0.0)
    return (_centred(k, blocks, weights)).transpose(-2, -1) @ v


def covariances(k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    """Every H_j: `[..., n, D, D_v]`, as large as D_v blocks of keys. For definitions and tests."""
    return torch.cat(list(_parts(k, v, blocks)), dim=-3)


def covariance_norms(k: Tensor, v: Tensor, blocks: Blocks, *, centred: bool) -> Tensor:
    """Frobenius norms `[..., n]` of every H_j, or of its deviation from their mean.

    A few are formed at a time and dropped again, so that memory does not grow with the blocks.

    Args:
        k, v: as for `covariance_sum`.
        centred: subtract the mean of all H_j first, as PISA's theorem 3.1 has it (its code does
            not).
    """
    mean = covariance_sum(k, v, blocks) / blocks.n if centred else None
    norms = []
    for part in _parts(k, v, blocks):
        deviation = part if mean is None else part - mean[..., None, :, :]
        norms.append(deviation.square().sum((-2, -1)).sqrt())
    return torch.cat(norms, dim=-1)


def _centred(k: Tensor, blocks: Blocks, weights: Tensor | None = None) -> Tensor:
    """Keys less the mean of their block, times the weight of their block."""
    of = blocks.of_token
    centred = k - block_means(k, blocks)[..., of, :]
    return centred if weights is None else centred * weights[of, None].to(k.dtype)


def _parts(k: Tensor, v: Tensor, blocks: Blocks) -> Iterator[Tensor]:
    """Every H_j in turn, some blocks at a time: `[..., few, D, D_v]`."""
    centred = _centred(k, blocks)
    places = torch.arange(blocks.size, device=k.device)
    token = (blocks.starts[:-1, None] + places).clamp(max=blocks.total - 1)
    behind = (places >= blocks.lengths[:, None])[..., None]
    for at, unseen in zip(token.split(_TOGETHER), behind.split(_TOGETHER), strict=True):
        # Behind a short block stands another, maybe a hidden one: a factor of 0 hides no NaN of it.
        keys, values = (x[..., at, :].masked_fill(unseen, 0.0) for x in (centred, v))
        yield keys.transpose(-2, -1) @ values
