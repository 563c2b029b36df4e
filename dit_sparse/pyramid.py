"""From importance to levels, as PSA does it (arXiv 2512.04025): the best blocks of a row are read
exactly, the next ones as means of 2, 4 and 8 keys, the rest is skipped."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dit_sparse.plan import Blocks

Allocation = Literal["quantile", "mass"]
_FLOOR = 0.06  # of the blocks are exact in any row where levels go by mass, as in the public code


def levels(
    importance: Tensor,
    ends: dict[int, float],
    allocation: Allocation,
    *,
    candidates: int | None = None,
    multiples: dict[int, int] | None = None,
) -> Tensor:
    """A level for every pair of blocks: uint8, shape of the importance; 0 skips a block.

    The blocks of a row are ranked by importance, and every level takes the next ones up to its end.

    Args:
        importance: `[..., n_k]`, at least 0, or -inf for blocks that are never chosen.
        ends: for every pool factor (1 is exact), ascending, the cumulative share of blocks
            (`"quantile"`) or of importance (`"mass"`) where its level ends.
        candidates: how many blocks of a row may be chosen; all by default.
        multiples: for a factor, a number that the count of its blocks is rounded to a multiple of,
            as kernels need that fill a tile from several blocks (the public code; ours does not).
    """
    n_k = importance.shape[-1]
    candidates = n_k if candidates is None else candidates
    ranked, block = importance.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(n_k, device=importance.device)
    by_rank = torch.zeros_like(ranked, dtype=torch.uint8)
    previous = torch.zeros_like(block[..., :1])
    raw = previous
    for factor, end in ends.items():
        if allocation == "quantile":
            raw = torch.full_like(previous, min(candidates, int(end * candidates + 1e-9)))
        else:
            raw = _mass_end(ranked, end, previous)
        stop = _rounded(previous, raw, candidates, (multiples or {}).get(factor, 1))
        if allocation == "mass" and factor == 1:
            stop = stop.clamp(min=min(candidates, int(_FLOOR * candidates) + 1))
        taken = (rank >= previous) & (rank < stop) & (ranked > -torch.inf)
        by_rank.masked_fill_(taken, factor)
        previous = stop
    return torch.zeros_like(by_rank).scatter_(-1, block, by_rank)


def _mass_end(ranked: Tensor, end: float, previous: Tensor) -> Tensor:
    """One block more than those whose cumulated share stays below the end; as before if none does.

    A single block above the end thus leaves a level empty, as in the public code.
    """
    shares = ranked.clamp(min=0)
    cumulated = shares.cumsum(-1) / shares.sum(-1, keepdim=True).clamp(min=1e-30)
    below = (cumulated <= end + 1e-6).sum(-1, keepdim=True)
    return torch.where(below > 0, below + 1, previous)


def _rounded(previous: Tensor, raw: Tensor, most: int, multiple: int) -> Tensor:
    """Where a level that begins at `previous` ends, its length a multiple."""
    if multiple == 1:
        return torch.maximum(previous, raw.clamp(max=most))
    length = -(-(raw - previous).clamp(min=0) // multiple) * multiple
    end = (previous + length).clamp(max=most)
    cut = previous + (end - previous) // multiple * multiple
    return torch.where(end == most, cut, end)


def similarity_cap(k: Tensor, blocks: Blocks, thresholds: dict[int, float]) -> Tensor:
    """The coarsest level that the likeness of its keys allows each block: uint8 `[B, H, n]`.

    A level g is allowed if the mean cosine between the first and the last key of its groups of g
    exceeds the threshold; levels are tested independently. The public code takes these end points
    too, where the paper compares all keys of a group. Incomplete groups do not count; a block
    without a complete one allows the level.

    Args:
        k: `[B, H, N, D]` in the order of the blocks.
        thresholds: by pool factor; -1 allows every block.
    """
    cap = torch.ones(*k.shape[:2], blocks.n, dtype=torch.uint8, device=k.device)
    token = torch.arange(k.shape[2], device=k.device)
    within = token - blocks.starts[blocks.of_token]
    unit = torch.nn.functional.normalize(k.float(), dim=-1)
    for factor, threshold in sorted(thresholds.items()):
        if factor > k.shape[2] or threshold >= 1:  # no cosine exceeds 1, but for rounding
            continue
        first = token[: k.shape[2] - factor + 1]
        cosine = (unit[:, :, first] * unit[:, :, first + factor - 1]).sum(-1)
        room = blocks.lengths[blocks.of_token[first]] - within[first]
        counts = (within[first] % factor == 0) & (room >= factor)
        sums = cosine.new_zeros(*cosine.shape[:2], blocks.n)
        sums.index_add_(-1, blocks.of_token[first], cosine * counts)
        number = sums.new_zeros(blocks.n).index_add_(0, blocks.of_token[first], counts.float())
        allowed = (sums / number.clamp(min=1) > threshold) | (number == 0) | (threshold <= -1)
        cap.masked_fill_(allowed, factor)
    return cap


def capped(level: Tensor, cap: Tensor) -> Tensor:
    """Levels `[B, H, n_q, n_k]` no coarser than the cap `[B, H, n_k]`; skipped blocks stay so."""
    return torch.minimum(level, cap[:, :, None])
