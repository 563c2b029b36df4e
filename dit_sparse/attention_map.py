"""What the softmax map of a head looks like, block by block, without ever holding the map.

A map of N x N weights does not fit into memory (23 GB per head at 75,600 tokens), so that it is
made for a few query blocks at a time and reduced to three numbers per pair of blocks. What that
means is written here; a GPU does the same in `kernels/attention_map.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.backend import planning_module, refuses_beyond_basics
from dit_sparse.frame import Frame
from dit_sparse.plan import Blocks

_WEIGHTS = 1 << 22  # elements of the map that are held at a time
_SPARSE_SHARE = 0.9
_SMALL = 17.0  # times the mean weight 1/N: 1e-3 at 17,550 tokens, the paper's example


class BlockStatistics(NamedTuple):
    """The weights of every pair of blocks: `[H, n_q, n_k]`, fp32 (fp64 for fp64 tensors).

    Args:
        sums: of the weights.
        maxima: largest weight.
        small: how many weights are below the bound that was asked for.
    """

    sums: Tensor
    maxima: Tensor
    small: Tensor


class MapMetrics(NamedTuple):
    """How good an order is for a head, `[H]` each; the first two are PARO's (arXiv 2506.16054).

    Args:
        sparse: share of the blocks that could be skipped, at least 90 % of whose weights are below
            17/N. More is better.
        incoherence: mean over blocks of their largest weight over their mean weight. Less is
            better.
        concentration: mean over rows of the sum of squared shares of their blocks, 1/m where m
            blocks share the mass evenly. More is better. Not of the paper, which calls a block
            with a thin diagonal skippable, though all the mass of its rows may lie there.
    """

    sparse: Tensor
    incoherence: Tensor
    concentration: Tensor


def block_statistics(
    q: Tensor, k: Tensor, blocks: Blocks, bound: float, hidden: Tensor | None = None
) -> BlockStatistics:
    """Sums, maxima and counts of softmax weights per pair of blocks.

    Every row is normalised over all keys that are not hidden. Memory is bounded: on a GPU nothing
    of the map is kept, elsewhere it exists for some query blocks of some heads at a time.

    Args:
        q, k: `[H, N, D]` in plan order.
        blocks: the cut of queries and of keys.
        bound: weights below it are counted as small.
        hidden: bool `[n]`, key blocks that are not read; `None`: all are.
    """
    kernels = planning_module("attention_map", q)
    if kernels and refuses_beyond_basics(q, k) is None:
        return BlockStatistics(*kernels.block_statistics(q, k, blocks, bound, hidden))
    together = max(1, _WEIGHTS // (blocks.n * blocks.size**2))
    parts = [
        _of_heads(*heads, blocks, bound, hidden)
        for heads in zip(q.split(together), k.split(together), strict=True)
    ]
    return BlockStatistics(*map(torch.cat, zip(*parts, strict=True)))


def _of_heads(
    q: Tensor, k: Tensor, blocks: Blocks, bound: float, hidden: Tensor | None
) -> BlockStatistics:
    """`block_statistics` of so few heads that one query block of each fits."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    within = torch.arange(blocks.size, device=q.device)
    real = within < blocks.lengths[:, None]
    token = ((blocks.starts[:-1, None] + within) * real).long()
    queries = q.to(dtype)[:, token] * q.shape[-1] ** -0.5  # [H, n, size, D]
    keys = k.to(dtype)[:, token].flatten(1, 2).transpose(-2, -1)
    seen = real if hidden is None else real & ~hidden[:, None]
    step = max(1, _WEIGHTS // (q.shape[0] * real.numel() * blocks.size))
    parts = [
        _reduce(rows @ keys, inside, seen, bound)
        for rows, inside in zip(
            (part.flatten(1, 2) for part in queries.split(step, dim=1)),
            real.split(step),
            strict=True,
        )
    ]
    return BlockStatistics(*(torch.cat(found, dim=1) for found in zip(*parts, strict=True)))


def _reduce(scores: Tensor, inside: Tensor, seen: Tensor, bound: float) -> BlockStatistics:
    """Of scores `[H, c * size, n * size]`, c query blocks whose real rows are `inside`."""
    weights = scores.masked_fill_(~seen.flatten(), -torch.inf).softmax(-1)
    weights = weights.view(scores.shape[0], *inside.shape, *seen.shape)
    pair = inside[:, :, None, None] & seen
    weights.mul_(pair)
    small = ((weights < bound) & pair).sum((2, 4)).to(weights.dtype)
    return BlockStatistics(weights.sum((2, 4)), weights.amax((2, 4)), small)


def small_weight(tokens: int) -> float:
    """The bound below which a weight of a row of this many tokens is small.

    The paper's 1e-3 is meant for 17,550 tokens; a fixed number would call everything small in a
    long sequence and nothing in a short one.
    """
    return _SMALL / tokens


def map_metrics(statistics: BlockStatistics, frame: Frame) -> MapMetrics:
    """The metrics over the pairs of complete blocks of the picture.

    A grid of less than a block has no complete one: then all are 0 for every order.
    """
    size = frame.blocks.size
    complete = ((frame.blocks.lengths == size) & ~frame.context).nonzero().flatten()
    sums, maxima, small = (x[:, complete][:, :, complete] for x in statistics)
    if not complete.numel():
        nothing = sums.sum((1, 2))
        return MapMetrics(nothing, nothing, nothing)
    sparse = (small >= _SPARSE_SHARE * size**2).to(sums.dtype).mean((1, 2))
    ratio = maxima * size**2 / sums
    flat = ratio.masked_fill(sums == 0, 1.0)  # a block of zeros is as flat as one can be
    shares = sums / sums.sum(-1, keepdim=True).clamp_min(torch.finfo(sums.dtype).tiny)
    return MapMetrics(sparse, flat.mean((1, 2)), shares.square().sum(-1).mean(1))


def picture_sums(statistics: BlockStatistics, frame: Frame) -> Tensor:
    """The sums of the picture's blocks alone: `[H, c, c]`, c `frame.candidates`."""
    picture = (~frame.context).nonzero().flatten()
    return statistics.sums[:, picture][:, :, picture]
