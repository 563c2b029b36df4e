"""Which sliding-tile window each head gets: by its error, and by what it costs.

STA (arXiv 2502.04507, algorithm 1) runs every candidate in every layer and head, compares with
dense attention, and takes the one of least error, whatever it costs. Here all heads share a budget:
the windows chosen have the least total error among all choices of their total cost or less, up to
what Lagrange multipliers reach (the lower convex hull of error over cost).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.attention import attend, dense_attention
from dit_sparse.grid import TokenLayout
from dit_sparse.method import CallContext
from dit_sparse.methods.sta import SlidingTileMethod
from dit_sparse.per_axis import Extents
from dit_sparse.plan import BlockPlan
from dit_sparse.window_table import WindowTable

_HALVINGS = 100  # of the interval that holds the multiplier: far below the precision of errors


class Sample(NamedTuple):
    """One attention call of a dense generation.

    Args:
        layer: number of the attention module.
        q, k, v: `[B, H, N, D]` in the model's order.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor


def search(
    samples: Iterable[Sample],
    layout: TokenLayout,
    candidates: Sequence[Extents],
    *,
    tile: Extents,
    budget: float,
    costs: Sequence[float] | None = None,
    block: int = 128,
) -> WindowTable:
    """The table of windows of least error within a budget.

    Args:
        samples: calls of all layers, numbered from 0; any number for each, such as some steps of
            some prompts. They are looked at one by one and not kept.
        layout: their sequence.
        candidates: windows in tiles.
        tile: tokens of a tile.
        budget: mean cost of a head, in the unit of `costs`.
        costs: of each candidate, such as measured seconds of its plan; its density by default.
        block: tokens a block holds at most.

    Raises:
        ValueError: no samples of some layer, a budget below the cheapest candidate, or costs of
            another number.
    """
    if not candidates:
        raise ValueError("Expected candidates to choose from, got none.")
    plans = [_plan(layout, window, tile, block) for window in candidates]
    shares = torch.tensor([plan.density for plan in plans], dtype=torch.float64)
    prices = shares if costs is None else torch.tensor(costs, dtype=torch.float64)
    if prices.shape != shares.shape:
        raise ValueError(
            f"Expected a cost for each of {len(candidates)} candidates, got {len(prices)}."
        )
    errors = _mean_errors(samples, layout, plans)
    chosen = choose(errors, prices, budget)
    windows = tuple(tuple(candidates[c] for c in heads) for heads in chosen.tolist())
    error = errors.gather(-1, chosen[..., None]).mean()
    return WindowTable(layout.grid, tile, windows, float(shares[chosen].mean()), float(error))


def choose(errors: Tensor, costs: Tensor, budget: float) -> Tensor:
    """The candidate of each head.

    Args:
        errors: float64 `[..., candidates]`.
        costs: float64 `[candidates]`.
        budget: mean cost at most.

    Returns:
        int64 `[...]`.

    Raises:
        ValueError: the budget is below the cheapest candidate, or errors are not finite.
    """
    if not budget >= float(costs.min()):  # NaN fails too
        raise ValueError(
            f"Expected a budget of at least {float(costs.min()):.4g}, the cheapest candidate, got "
            f"{budget}."
        )
    if not bool(errors.isfinite().all()):
        raise ValueError("Expected finite errors, got some that are not. Check the samples.")
    by_cost = costs.argsort(stable=True)  # of equal sums the cheaper one comes first

    def at(price: float) -> Tensor:
        return by_cost[(errors + price * costs)[..., by_cost].argmin(-1)]

    def fits(chosen: Tensor) -> bool:
        return float(costs[chosen].mean()) <= budget * (1 + 1e-12)

    free = at(0.0)
    if fits(free):
        return free
    low, high = 0.0, 1.0
    while not fits(at(high)):
        low, high = high, high * 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(at(middle)) else (middle, high)
    return at(high)


def head_errors(sample: Sample, layout: TokenLayout, plans: Sequence[BlockPlan]) -> Tensor:
    """Mean squared difference from dense attention, float64 `[H, plans]`."""
    _, q, k, v = sample
    exact = dense_attention(q, k, v, layout=layout).float()
    found = [
        (attend(q, k, v, plan.to(q.device)).out.float() - exact).square().mean((0, 2, 3))
        for plan in plans
    ]
    return torch.stack(found, dim=-1).double().cpu()


def _mean_errors(
    samples: Iterable[Sample], layout: TokenLayout, plans: Sequence[BlockPlan]
) -> Tensor:
    """float64 `[layers, H, plans]`."""
    totals: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    for sample in samples:
        added = head_errors(sample, layout, plans)
        totals[sample.layer] = totals.get(sample.layer, torch.zeros_like(added)) + added
        counts[sample.layer] = counts.get(sample.layer, 0) + 1
    if sorted(totals) != list(range(len(totals))) or not totals:
        raise ValueError(
            f"Expected samples of layers 0, 1, 2 and so on, got layers {sorted(totals)}. Record "
            "every attention module of the transformer."
        )
    return torch.stack([totals[layer] / counts[layer] for layer in sorted(totals)])


def _plan(layout: TokenLayout, window: Extents, tile: Extents, block: int) -> BlockPlan:
    nothing = torch.empty(0)
    method = SlidingTileMethod(window=window, tile=tile, block=block)
    return method.plan(nothing, nothing, CallContext(layout))
