"""Which blocks of an averaged softmax map are worth reading: by mass, or within a budget.

The offline masks of PARO (arXiv 2506.16054). The paper says "a threshold on the sum of attention
in each block"; how thresholds are shared between heads it does not say. Here all heads of a layer
share one budget, unless each is to have its own: heads with concentrated maps give to the others.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from dit_sparse.attention_map import MapMetrics

Criterion: TypeAlias = Literal["paper", "concentration", "raster"]


def choose_orders(
    metrics: MapMetrics, criterion: Criterion = "concentration", *, alpha: float = 0.5
) -> Tensor:
    """int64 `[H]`: the candidate order with the least cost for each head, the first among equals.

    The paper minimises `alpha * sparse + (1 - alpha) * incoherence`, each over its sum over the
    orders. As printed that would reward maps with *few* blocks to skip, so that 1 - sparse stands
    for sparse here.

    Args:
        metrics: of every candidate, `[orders, H]` each, means over what was sampled.
        criterion: `"paper"`; `"concentration"` for the order whose mass lies in fewest blocks; or
            `"raster"` for the first candidate, the model's own order.
        alpha: weight of the paper's sparsity, 0 to 1.
    """
    if criterion == "raster":
        cost = torch.zeros_like(metrics.sparse)
    elif criterion == "concentration":
        cost = 1 - metrics.concentration
    else:
        dense = 1 - metrics.sparse
        cost = alpha * _share(dense) + (1 - alpha) * _share(metrics.incoherence)
    # Equal maps differ by rounding; the first of them is to win on every machine.
    equal = cost <= cost.amin(0) + 1e-5
    return equal.to(torch.uint8).argmax(0)


def _share(x: Tensor) -> Tensor:
    total = x.sum(0)
    return torch.where(total > 0, x / total, 0.0)


def row_shares(sums: Tensor) -> Tensor:
    """Block sums `[H, n, n]` as shares of their row, fp64; a row of zeros is spread evenly."""
    sums = sums.double()
    total = sums.sum(-1, keepdim=True)
    return torch.where(total > 0, sums / total, 1.0 / sums.shape[-1])


def by_mass(shares: Tensor, mass: float, forced: Tensor) -> Tensor:
    """bool `[H, n, n]`: the fewest blocks of each row that hold this share of it, and those forced.

    A block is kept while those above it hold less than `mass`: at least one is, and masks of a
    larger mass hold those of a smaller one.
    """
    ranked, block = shares.sort(dim=-1, descending=True, stable=True)
    kept = ranked.cumsum(-1) - ranked < mass
    if mass >= 1.0:  # what rounding leaves of a row is not to be lost
        kept = torch.ones_like(kept)
    return torch.zeros_like(kept).scatter_(-1, block, kept) | forced


def by_density(shares: Tensor, density: float, forced: Tensor, *, shared: bool) -> Tensor:
    """bool `[H, n, n]`: the blocks with the largest shares, this part of all of them.

    The largest block of every row and those forced are kept first, and count.

    Args:
        shared: one budget for all heads; otherwise one for each.

    Raises:
        ValueError: the density has not room for what must be kept.
    """
    best = shares.argmax(-1, keepdim=True)
    first = torch.zeros_like(shares, dtype=torch.bool).scatter_(-1, best, True) | forced
    groups = 1 if shared else shares.shape[0]
    ranking = shares.masked_fill(first, torch.inf).reshape(groups, -1)
    budget = math.floor(density * ranking.shape[1] + 1e-9)
    needed = int(first.reshape(groups, -1).sum(1).max())
    if needed > budget:
        raise ValueError(
            f"Expected a density of at least {math.ceil(1e4 * needed / ranking.shape[1]) / 1e4} "
            f"for {shares.shape[-1]} x {shares.shape[-1]} blocks, since the largest block of each "
            f"row and blocks cut short by the grid are read in any case, got {density}. Raise it "
            "or take smaller blocks."
        )
    chosen = ranking.argsort(dim=1, descending=True, stable=True)[:, :budget]
    mask = torch.zeros_like(ranking, dtype=torch.bool).scatter_(1, chosen, True)
    return mask.view(shares.shape)


def kept_mass(shares: Tensor, mask: Tensor) -> Tensor:
    """fp64 `[H]`: the share of the softmax mass among picture blocks that a mask reads."""
    return (shares * mask).sum(-1).mean(-1)
