"""Everything that planning and attention want to know of q, k and v, each read once."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.backend import BlockSummaries
from dit_sparse.kernels._summaries import _summaries_fwd
from dit_sparse.kernels.hopper import suits
from dit_sparse.kernels.launch import device_of
from dit_sparse.kernels.portable import padded
from dit_sparse.plan import Blocks

_ROWS, _WARPS = 32, 2  # of a program


def worth(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> bool:
    """Whether attention takes what `measure` finds: the kernels of Hopper do."""
    alike = q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype
    unit = all(x.stride(-1) == 1 for x in (q, k, v))
    return q.is_cuda and alike and unit and suits(q, v, blocks)


def measure(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, hidden: Tensor | None, *, values: bool
) -> BlockSummaries:
    """Summaries in one launch.

    Args:
        q, k, v: `[B, H, N, D]` of one dtype in the order of the blocks, unit stride along D.
        blocks: of a size of a power of two.
        hidden: bool `[1 or B, n]`, blocks of keys that are not there.
        values: whether to read v, and make the means of k and v.
    """
    batch, heads, tokens, dim = q.shape
    lead = (batch, heads, blocks.n)
    centres = q.new_empty(2, *lead, dim, dtype=torch.float32)
    means = k.new_empty(2, *lead, dim) if values else None
    lengths = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    longest = q.new_empty(lead, dtype=torch.float32)
    with device_of(q):
        _summaries_fwd[(batch * heads, blocks.n, 3 if values else 2)](
            q, k, v, centres, centres if means is None else means, lengths, longest, blocks.starts,
            centres if hidden is None else hidden.view(torch.uint8),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            blocks.n if hidden is not None and hidden.shape[0] > 1 else 0,
            heads, tokens, blocks.n, dim**-0.5,
            D=dim, BLOCK_D=padded(dim), SIZE=blocks.size, ROWS=min(_ROWS, blocks.size),
            HAS_HIDDEN=hidden is not None, VALUES=values, num_warps=_WARPS,
        )  # fmt: skip
    return BlockSummaries(centres[0], centres[1], means, lengths, longest)
