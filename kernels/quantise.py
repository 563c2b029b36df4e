"""Queries, keys and values in 8 bits, for the kernels that multiply them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dit_sparse.kernels._quantise import _centres_fwd, _extremes_fwd, _quantise_fwd
from dit_sparse.kernels.portable import padded
from dit_sparse.plan import BlockPlan

_ROWS = 32  # rows of a tile of the first pass
_CHUNKS = 64  # programs of a head in the first pass
_SAMPLE = 8192  # keys whose mean is near enough to that of all of them


@dataclass(frozen=True, eq=False)
class Quantised:
    """Blocks of a plan in 8 bits; `W` is the head dim, padded, and short blocks are padded too:
    keys with copies of the last one, queries and values with 0.

    Args:
        q, k: int8 or e4m3 `[B, H, n, size, W]`, in plan order; keys less the mean key if smooth.
        q_step, k_step: fp32 `[B, H, n]`, what a block was divided by.
        shift: fp32 `[B, H, N_q]` in plan order, products of queries and the mean key, which all
            scores of a query have lost; `None` if not smooth.
        v: e4m3 `[B, H, W, n_k * size]`, keys along the last dimension; `None`: not quantised.
        centres: fp32 `[B, H, 3, W]`: mean key; mean value, which `v` is without; and what each
            channel of `v` was divided by.
    """

    q: Tensor
    k: Tensor
    q_step: Tensor
    k_step: Tensor
    shift: Tensor | None
    v: Tensor | None
    centres: Tensor


def quantise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    integers: bool = False,
    values: bool = True,
    smooth: bool = True,
) -> Quantised:
    """Quantises blocks of queries and keys, and values by channel, and puts them in plan order.

    Args:
        q, k, v: `[B, H, N, D]` in the caller's order, unit stride along D.
        integers: queries and keys in int8 rather than e4m3.
        values: quantise the values too, in e4m3.
        smooth: subtract the mean key, or one near it, from all keys (arXiv 2410.02367): it adds
            the same to all scores of a query, and takes the outlying channels with it.
    """
    batch, heads, n_queries, dim = q.shape
    width, size = padded(max(dim, v.shape[-1])), plan.q_blocks.size
    n_q, n_k = plan.q_blocks.n, plan.k_blocks.n
    dtype = torch.int8 if integers else torch.float8_e4m3fn
    centres = _centres(k, v, width, values) if smooth or values else q.new_empty(0)
    of_rows = q.new_empty(batch, heads, n_queries if smooth else 0, dtype=torch.float32)
    q_step, k_step = (q.new_empty(batch, heads, n, dtype=torch.float32) for n in (n_q, n_k))
    q8, k8 = (q.new_empty(batch, heads, n, size, width, dtype=dtype) for n in (n_q, n_k))
    columns = n_k * size if values else 0
    transposed = q.new_empty(batch, heads, width, columns, dtype=torch.float8_e4m3fn)
    index = plan.q_blocks.starts if plan.order is None else plan.order.index
    _quantise_fwd[(max(n_q, n_k), batch * heads, 3 if values else 2)](
        q, k, v, q8, k8, transposed, q_step, k_step, of_rows, centres,
        plan.q_blocks.starts, plan.k_blocks.starts, index,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        index.stride(0) if index.ndim == 2 else 0, heads, n_q, n_k, n_queries,
        D=dim, DV=v.shape[-1], BLOCK_D=width, SIZE=size,
        INTEGERS=integers, SMOOTH=smooth, HAS_ORDER=plan.order is not None, num_warps=8,
    )  # fmt: skip
    shift = of_rows if smooth else None
    return Quantised(q8, k8, q_step, k_step, shift, transposed if values else None, centres)


def _centres(k: Tensor, v: Tensor, width: int, values: bool) -> Tensor:
    batch, heads, n_keys, dim = k.shape
    per_chunk = -(-n_keys // (_CHUNKS * _ROWS)) * _ROWS
    chunks = -(-n_keys // per_chunk)
    every = max(1, min(8, n_keys // _SAMPLE))
    sampled = _sampled(n_keys, per_chunk, every)
    parts = k.new_empty(batch, heads, chunks, 4, width, dtype=torch.float32)
    centres = k.new_empty(batch, heads, 3, width, dtype=torch.float32)
    _extremes_fwd[(chunks, batch * heads)](
        k, v, parts, *k.stride()[:3], *v.stride()[:3], heads, n_keys, per_chunk,
        D=dim, DV=v.shape[-1], BLOCK_D=width, ROWS=_ROWS, EVERY=every, VALUES=values, num_warps=8,
    )  # fmt: skip
    _centres_fwd[(batch * heads,)](
        parts, centres, chunks, sampled, n_keys, 448.0,
        BLOCK_D=width, CHUNKS=_CHUNKS, VALUES=values, num_warps=4,
    )  # fmt: skip
    return centres


@cache
def _sampled(n_keys: int, per_chunk: int, every: int) -> int:
    """How many keys `_extremes_fwd` adds up: of every chunk, one in `every` tiles."""
    count = 0
    for first in range(0, n_keys, per_chunk):
        stop = min(first + per_chunk, n_keys)
        count += sum(min(_ROWS, n_keys - at) for at in range(first, stop, _ROWS * every))
    return count
