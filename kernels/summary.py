"""Means of keys and values and their mean covariance, in one pass over both."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.kernels._summary import _summary_fwd
from dit_sparse.kernels.portable import padded
from dit_sparse.plan import Blocks

_STAGES = 3


class Summary(NamedTuple):
    """What stands for blocks of keys and values.

    Args:
        keys, values: mean of every block in the dtype of the keys, `[B, H, W, D]`; rows of zeros
            fill up whole tiles.
        slope: key-value covariance per token, `[B, H, D, D_v]`.
    """

    keys: Tensor
    values: Tensor
    slope: Tensor


def summarise(
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    *,
    tile: int,
    hidden: Tensor | None = None,
) -> Summary:
    """Sums are fp32, and keys are centred about their block's mean before they are multiplied.

    Args:
        k, v: `[B, H, N, D]` and `[B, H, N, D_v]` in the order of the blocks, unit stride along D.
        tile: W is the multiple of this number that holds all blocks.
        hidden: bool `[1 or B, n]`, blocks that count as zeros, whatever they hold.
    """
    batch, heads, _, dim = k.shape
    value_dim, width = v.shape[-1], -(-blocks.n // tile) * tile
    new = k.new_empty if width == blocks.n else k.new_zeros
    keys, values = new(batch, heads, width, dim), new(batch, heads, width, value_dim)
    chunks = min(blocks.n, _chunks(k.device, batch * heads))
    per_chunk = -(-blocks.n // chunks)
    chunks = -(-blocks.n // per_chunk)
    parts = k.new_empty(batch, heads, chunks, dim, value_dim, dtype=torch.float32)
    _summary_fwd[(batch * heads * chunks,)](
        k, v, keys, values, parts,
        keys if hidden is None else hidden.view(torch.uint8), blocks.starts,
        *k.stride()[:3], *v.stride()[:3],
        blocks.n if hidden is not None and hidden.shape[0] > 1 else 0,
        heads, blocks.n, width, chunks, per_chunk,
        D=dim, DV=value_dim, BLOCK_D=padded(dim), BLOCK_DV=padded(value_dim), SIZE=blocks.size,
        HAS_HIDDEN=hidden is not None, num_warps=8, num_stages=_STAGES,
    )  # fmt: skip
    tokens = _tokens(blocks, hidden)
    return Summary(keys, values, (parts.sum(2) / tokens).to(k.dtype))


def _tokens(blocks: Blocks, hidden: Tensor | None) -> Tensor:
    """fp32 `[1 or B, 1, 1, 1]`, tokens that are not hidden."""
    lengths = blocks.lengths.float()
    if hidden is not None:
        lengths = lengths * ~hidden
    return lengths.sum(-1).clamp(min=1).view(-1, 1, 1, 1)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, or as many as tests need."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def _chunks(device: torch.device, pairs: int) -> int:
    """Chunks of a head: enough programs to fill the device once."""
    return max(1, processors(device) // pairs)
