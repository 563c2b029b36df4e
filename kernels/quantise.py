"""Queries, keys and values in 8 bits, for the kernels that multiply them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_sparse.kernels._quantise import (
    _centres_fwd,
    _extremes_fwd,
    _quantise_rows_fwd,
    _quantise_values_fwd,
)
from dit_sparse.kernels.launch import Launch, launch
from dit_sparse.kernels.portable import padded
from dit_sparse.plan import BlockPlan, Blocks

_ROWS, _WARPS = 16, 4  # of a tile of the first pass: less time than 32 rows and 8 [H200]
_STAGES = 3  # tiles of the first pass that are on their way, and the one that is added
_CHUNKS = 64  # programs of a head in the first pass
_SAMPLE = 8192  # keys whose mean is near enough to that of all of them
_ROOM = 8.0  # how far values may be beyond those of the sample: e4m3 has small numbers to spare
_FLOOR = 2.0**-10  # least reach of a channel in a sample, in that of the head's widest
_E4M3_MAX = 448.0


@dataclass(frozen=True, eq=False)
class Quantised:
    """Blocks of a plan in 8 bits; `W` is the head dim, padded, and short blocks are padded too:
    keys and queries with copies of the last one, values with 0.

    Args:
        q, k: int8 or e4m3 `[B, H, n, size, W]`, in plan order; keys less the mean key, or one near
            it, which adds the same to all scores of a query and takes the outlying channels with it
            (arXiv 2410.02367).
        q_step, k_step: fp32 `[B, H, n]`, what a block was divided by.
        shift: fp32 `[B, H, N_q]` in plan order, products of queries and the mean key, which all
            scores of a query have lost.
        v: e4m3 `[B, H, n_k, W, size]`, keys along the last dimension; `None`: not quantised.
        centres: fp32 `[B, H, 3, W]`: mean key; mean value, which `v` is without; and what each
            channel of `v` was divided by.
        excess: fp32 `[B, H]`: the greatest of the values after that division where that is more
            than e4m3 holds, or 0; then all values of the head were divided by `excess / 448` too.
        parts: fp32 `[B, H, chunks, 6, W]`, what the centres are made of.
    """

    q: Tensor
    k: Tensor
    q_step: Tensor
    k_step: Tensor
    shift: Tensor
    v: Tensor | None
    centres: Tensor
    excess: Tensor
    parts: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        values = () if self.v is None else (self.v,)
        return (
            *(self.q, self.k, self.q_step, self.k_step, self.shift),
            *(*values, self.centres, self.excess, self.parts),
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
    per_chunk = _per_chunk(v.shape[2])
    parts = (*of_head, -(-v.shape[2] // per_chunk), 6, width)
    return Quantised(
        q=q.new_empty(*of_head, n_q, size, width, dtype=dtype),
        k=q.new_empty(*of_head, n_k, size, width, dtype=dtype),
        q_step=q_step,
        k_step=k_step,
        shift=shift,
        v=q.new_empty(*of_head, n_k, width, size, dtype=torch.float8_e4m3fn) if values else None,
        centres=q.new_empty(*of_head, 3, width, dtype=torch.float32),
        excess=q.new_empty(of_head, dtype=torch.float32),
        parts=q.new_empty(parts, dtype=torch.float32),
    )


def fill(into: Quantised, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> list[Launch]:
    """Writes everything that `into` has room for; see `quantise`."""
    launches = _centres(into, k, v, hidden_tokens(plan))
    for x, out, steps, blocks, keys in (
        (k, into.k, into.k_step, plan.k_blocks, True),
        (q, into.q, into.q_step, plan.q_blocks, False),
    ):
        places, strides, constants = _placed(x, into, blocks, plan)
        arguments = (x, out, steps, into.shift, into.centres, *places, *strides, x.shape[2])
        constants |= {"KEYS": keys, "INTEGERS": out.dtype == torch.int8}
        grid = (x.shape[0] * x.shape[1], blocks.n, 1)
        launches.append(launch(_quantise_rows_fwd, grid, arguments, constants, warps=8, stages=1))
    if into.v is not None:
        launches += _values(into, into.v, v, plan)
    return launches


def _values(into: Quantised, out: Tensor, v: Tensor, plan: BlockPlan) -> list[Launch]:
    places, strides, constants = _placed(v, into, plan.k_blocks, plan)
    hidden = out if plan.hidden is None else plan.hidden.view(torch.uint8)
    by_batch = 0 if plan.hidden is None or plan.hidden.shape[0] == 1 else plan.k_blocks.n
    arguments = (v, out, into.centres, into.excess, hidden, *places, *strides, by_batch)
    sampled = _every(v.shape[2]) > 1
    constants |= {"HAS_HIDDEN": plan.hidden is not None, "SAMPLED": sampled}
    grid = (v.shape[0] * v.shape[1], plan.k_blocks.n, 1)
    return [
        launch(
            _quantise_values_fwd, grid, arguments, constants | {"AGAIN": again}, warps=8, stages=1
        )
        for again in ((False, True) if sampled else (False,))
    ]


def _placed(
    x: Tensor, into: Quantised, blocks: Blocks, plan: BlockPlan
) -> tuple[tuple[Tensor, Tensor], tuple[int, ...], dict[str, Any]]:
    """Where the rows of a block stand: blocks and order, strides and heads, and constants."""
    index = blocks.starts if plan.order is None else plan.order.index
    strides = (*x.stride()[:3], index.stride(0) if index.ndim == 2 else 0, x.shape[1])
    constants: dict[str, Any] = {
        "D": x.shape[-1],
        "BLOCK_D": into.q.shape[-1],
        "SIZE": blocks.size,
        "HAS_ORDER": plan.order is not None,
    }
    return (blocks.starts, index), strides, constants


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
        (batch * heads, chunks, 1),
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
            "EVERY": _every(n_keys),
            "VALUES": values,
            "HAS_HIDDEN": hidden is not None,
            "STAGES": _STAGES,
        },
        warps=_WARPS,
        stages=3,
    )
    range_v, floor = (_E4M3_MAX / _ROOM, _FLOOR) if _every(n_keys) > 1 else (_E4M3_MAX, 0.0)
    of_whole = launch(
        _centres_fwd,
        (batch * heads, 1, 1),
        (into.parts, into.centres, into.excess, chunks, range_v, floor),
        {"BLOCK_D": width, "CHUNKS": _CHUNKS, "VALUES": values},
        warps=4,
        stages=3,
    )
    return [of_parts, of_whole]


def _every(n_keys: int) -> int:
    """Of so many tiles one is looked at for means and steps."""
    return max(1, min(8, n_keys // _SAMPLE))


def _per_chunk(n_keys: int) -> int:
    """Keys of a program of the first pass, whole tiles."""
    return -(-n_keys // (_CHUNKS * _ROWS)) * _ROWS
