"""Queries, keys and values in 8 bits, for the kernels that multiply them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.kernels._quantise import _centres_fwd, _extremes_fwd, _quantise_fwd
from dit_sparse.kernels.launch import Launch, launch
from dit_sparse.kernels.portable import padded
from dit_sparse.plan import BlockPlan

_ROWS = 32  # rows of a tile of the first pass
_CHUNKS = 64  # programs of a head in the first pass
_SAMPLE = 8192  # keys whose mean is near enough to that of all of them
_E4M3_MAX = 448.0


@dataclass(frozen=True, eq=False)
class Quantised:
    """Blocks of a plan in 8 bits; `W` is the head dim, padded, and short blocks are padded too:
    keys with copies of the last one, queries and values with 0.

    Args:
        q, k: int8 or e4m3 `[B, H, n, size, W]`, in plan order; keys less the mean key, or one near
            it, which adds the same to all scores of a query and takes the outlying channels with it
            (arXiv 2410.02367).
        q_step, k_step: fp32 `[B, H, n]`, what a block was divided by.
        shift: fp32 `[B, H, N_q]` in plan order, products of queries and the mean key, which all
            scores of a query have lost.
        v: e4m3 `[B, H, W, n_k * size]`, keys along the last dimension; `None`: not quantised.
        centres: fp32 `[B, H, 3, W]`: mean key; mean value, which `v` is without; and what each
            channel of `v` was divided by.
        parts: fp32 `[B, H, chunks, 6, W]`, what the centres are made of.
    """

    q: Tensor
    k: Tensor
    q_step: Tensor
    k_step: Tensor
    shift: Tensor
    v: Tensor | None
    centres: Tensor
    parts: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        values = () if self.v is None else (self.v,)
        return (
            *(self.q, self.k, self.q_step, self.k_step, self.shift),
            *(*values, self.centres, self.parts),
        )


def quantise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    integers: bool = False,
    values: bool = True,
) -> Quantised:
    """Quantises blocks of queries and keys, and values by channel, and puts them in plan order.

    Args:
        q, k, v: `[B, H, N, D]` in the caller's order, unit stride along D.
        plan: its hidden keys, which nothing reads, have no part in means and steps.
        integers: queries and keys in int8 rather than e4m3.
        values: quantise the values too, in e4m3.
    """
    eight = empty(q, v, plan, integers=integers, values=values)
    fill(eight, q, k, v, plan)
    return eight


def empty(q: Tensor, v: Tensor, plan: BlockPlan, *, integers: bool, values: bool) -> Quantised:
    """Where `fill` puts tensors like these; see `quantise`."""
    batch, heads, n_queries, dim = q.shape
    width, size = padded(max(dim, v.shape[-1])), plan.q_blocks.size
    n_q, n_k = plan.q_blocks.n, plan.k_blocks.n
    dtype = torch.int8 if integers else torch.float8_e4m3fn
    of_head = (batch, heads)
    q_step, k_step, shift = (
        q.new_empty(*of_head, n, dtype=torch.float32) for n in (n_q, n_k, n_queries)
    )
    columns = (*of_head, width, n_k * size)
    per_chunk = _per_chunk(v.shape[2])
    parts = (*of_head, -(-v.shape[2] // per_chunk), 6, width)
    return Quantised(
        q=q.new_empty(*of_head, n_q, size, width, dtype=dtype),
        k=q.new_empty(*of_head, n_k, size, width, dtype=dtype),
        q_step=q_step,
        k_step=k_step,
        shift=shift,
        v=q.new_empty(columns, dtype=torch.float8_e4m3fn) if values else None,
        centres=q.new_empty(*of_head, 3, width, dtype=torch.float32),
        parts=q.new_empty(parts, dtype=torch.float32),
    )


def fill(into: Quantised, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> list[Launch]:
    """Writes everything that `into` has room for; see `quantise`."""
    batch, heads, n_queries, dim = q.shape
    n_q, n_k, width = plan.q_blocks.n, plan.k_blocks.n, into.q.shape[-1]
    index = plan.q_blocks.starts if plan.order is None else plan.order.index
    arguments = (
        q, k, v, into.q, into.k, into.shift if into.v is None else into.v,
        into.q_step, into.k_step, into.shift, into.centres,
        plan.q_blocks.starts, plan.k_blocks.starts, index,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        index.stride(0) if index.ndim == 2 else 0, heads, n_q, n_k, n_queries,
    )  # fmt: skip
    constants = {
        "D": dim,
        "DV": v.shape[-1],
        "BLOCK_D": width,
        "SIZE": plan.q_blocks.size,
        "INTEGERS": into.q.dtype == torch.int8,
        "HAS_ORDER": plan.order is not None,
    }
    launches = _centres(into, k, v, hidden_tokens(plan))
    grid = (max(n_q, n_k), batch * heads, 2 if into.v is None else 3)
    launches.append(launch(_quantise_fwd, grid, arguments, constants, warps=8, stages=3))
    return launches


def hidden_tokens(plan: BlockPlan) -> Tensor | None:
    """uint8 `[1 or B, 1 or H, N_k]`, 1 for keys of hidden blocks, in the caller's order; `None` if
    there are none."""
    if plan.hidden is None:
        return None
    hidden = plan.hidden.view(torch.uint8)[:, plan.k_blocks.of_token]
    if plan.order is None:
        return hidden[:, None]
    inverse = plan.order.inverse
    return hidden[:, inverse] if inverse.ndim == 2 else hidden[:, None, inverse]


def _centres(into: Quantised, k: Tensor, v: Tensor, hidden: Tensor | None) -> list[Launch]:
    batch, heads, n_keys, dim = k.shape
    chunks, width = into.parts.shape[2], into.parts.shape[-1]
    values = into.v is not None
    strides = (0, 0)
    if hidden is not None:
        b, h = (hidden.stride(n) if hidden.shape[n] > 1 else 0 for n in range(2))
        strides = (b, h)
    of_parts = launch(
        _extremes_fwd,
        (chunks, batch * heads, 1),
        (
            *(k, v, into.parts if hidden is None else hidden, into.parts),
            *(*k.stride()[:3], *v.stride()[:3], *strides),
            *(heads, n_keys, _per_chunk(n_keys)),
        ),
        {
            "D": dim,
            "DV": v.shape[-1],
            "BLOCK_D": width,
            "ROWS": _ROWS,
            "EVERY": max(1, min(8, n_keys // _SAMPLE)),
            "VALUES": values,
            "HAS_HIDDEN": hidden is not None,
        },
        warps=8,
        stages=3,
    )
    of_whole = launch(
        _centres_fwd,
        (batch * heads, 1, 1),
        (into.parts, into.centres, chunks, _E4M3_MAX),
        {"BLOCK_D": width, "CHUNKS": _CHUNKS, "VALUES": values},
        warps=4,
        stages=3,
    )
    return [of_parts, of_whole]


def _per_chunk(n_keys: int) -> int:
    """Keys of a program of the first pass, whole tiles."""
    return -(-n_keys // (_CHUNKS * _ROWS)) * _ROWS
