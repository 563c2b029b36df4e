"""PSA's importance of block pairs: the highest weight between a few sampled queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dit_sparse.backend import planning_module
from dit_sparse.frame import Frame

Norm = Literal["softmax", "max"]
_CHUNK = 1 << 26  # scores formed at a time


def sampled_tokens(frame: Frame, heads: int, count: int, seeds: Sequence[int]) -> Tensor:
    """Positions in the model's order of `count` tokens of every block: int64
    `[len(seeds), H, n, count]`.

    Every head draws places within a block once, without repeating any; all blocks use the same. A
    place beyond the end of a short block stands for its last token.

    Args:
        seeds: each draws places of its own; equal seeds draw equal ones, on any device.
    """
    blocks = frame.blocks
    drawn = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)  # on the host, so that devices agree
        drawn.append(torch.rand(heads, blocks.size, generator=generator).argsort(-1)[:, :count])
    places = torch.stack(drawn).sort(-1).values.int()
    places = places.to(blocks.starts.device, non_blocking=True)[:, :, None]
    tokens = torch.minimum(places, blocks.lengths[:, None] - 1) + blocks.starts[:-1, None]
    tokens = tokens.long()
    if frame.order is None:
        return tokens
    index = frame.order.index.expand(len(seeds), heads, -1)
    return index.gather(-1, tokens.flatten(2)).view_as(tokens)


def sampled_importance(
    q: Tensor,
    k: Tensor,
    frame: Frame,
    *,
    share: int = 4,
    norm: Norm = "softmax",
    seed: int = 0,
    causal: bool = False,
) -> Tensor:
    """Importance of every key block for every query block: fp32 `[B, H, n, n]`, rows sum to 1.

    Args:
        q, k: `[B, H, N, D]` in the model's order; k may have fewer heads, each for several of q.
        share: one in so many tokens of a block is sampled.
        norm: `"softmax"`: the highest softmax weight of a sampled pair, as the paper has it
            (section 3.2); `"max"`: the highest weight relative to the query's best block, as the
            public code has it, which ranks a query with a flat row as high as one with a peak.
        seed: of the places within blocks.
        causal: no query sees a later key; the rows of blocks whose samples see none are 0.
    """
    batch, heads, _, dim = q.shape
    blocks = frame.blocks
    count = max(1, blocks.size // share)
    tokens = sampled_tokens(frame, heads, count, (seed, seed + 1))
    at_q, at_k = tokens
    if heads > k.shape[1]:  # even once, repeating would copy all keys for the sake of a few
        k = k.repeat_interleave(heads // k.shape[1], dim=1)
    if count <= 64 and not causal and (kernels := planning_module("importance", q)):
        unit = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        importance = kernels.sampled_maximum(
            *kernels.take(*unit, tokens.flatten(2)),
            count,
            scale=dim**-0.5,
            softmax=norm == "softmax",
            hidden=frame.hidden,
        )
        return _normalised(importance)
    keys = _take(k, at_k.flatten(1))
    hidden = None if frame.hidden is None else frame.hidden[:, None, None, :, None]
    rows = max(1, _CHUNK // (batch * heads * count * count * blocks.n))
    parts = []
    for at in at_q.split(rows, dim=1):
        queries = _take(q, at.flatten(1)) * dim**-0.5
        unseen = hidden
        if causal:
            unseen = (at_k[:, None] > at.flatten(1)[:, :, None, None])[None]
        parts.append(_maximum(queries, keys, count, norm, unseen))
    return _normalised(torch.cat(parts, dim=2))


def _maximum(
    queries: Tensor, keys: Tensor, count: int, norm: Norm, hidden: Tensor | None
) -> Tensor:
    """What `kernels.importance.sampled_maximum` computes, all scores of some query blocks formed.

    Args:
        hidden: bool, broadcast to `[B, H, queries, n, count]`: sampled keys that are not seen.
    """
    scores = (queries @ keys.transpose(-2, -1)).float().unflatten(-1, (-1, count))
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    best = scores.amax(-1)  # [B, H, queries, n]
    base = best.amax(-1) if norm == "max" else scores.flatten(-2).logsumexp(-1)
    base = base.masked_fill(base == -torch.inf, 0.0)  # a query that sees no key weighs none
    weight = (best - base[..., None]).exp()
    return weight.unflatten(2, (-1, count)).amax(3)


def _normalised(importance: Tensor) -> Tensor:
    return importance / importance.sum(-1, keepdim=True).clamp(min=1e-30)


def _take(x: Tensor, tokens: Tensor) -> Tensor:
    """Rows `[B, H, m, D]` of x `[B, H, N, D]` at the positions `[H, m]`."""
    index = tokens[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[-1])
    return x.gather(2, index)
