"""Which sliding-tile window each head gets: by its error, and by what it costs.

STA (arXiv 2502.04507, algorithm 1) runs every candidate in every layer and head, compares with
dense attention, and takes the one of least error, whatever it costs. Here all heads share a budget:
the windows chosen have the least total error among all choices of their total cost or less, up to
what Lagrange multipliers reach (the lower convex hull of error over cost).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.attention import attend, dense_attention
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.method import CallContext
from dit_sparse.methods.sta import SlidingTileMethod
from dit_sparse.per_axis import Extents
from dit_sparse.plan import BlockPlan
from dit_sparse.window_table import WindowTable

_HALVINGS = 100  # of the interval that holds the multiplier: far below the precision of errors

#: A segment of the steps and a layer.
Place = tuple[int, int]


class Sample(NamedTuple):
    """One attention call of a dense generation.

    Args:
        layer: number of the attention module.
        q, k, v: `[B, H, N, D]` in the model's order.
        segment: of the steps, each of which gets windows of its own.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    segment: int = 0


def search(
    samples: Iterable[Sample],
    layout: TokenLayout,
    candidates: Sequence[Extents],
    *,
    tile: Extents,
    budget: float,
    costs: Sequence[float] | None = None,
    block: int = 128,
    segments: tuple[int, ...] = (),
) -> WindowTable:
    """The table of windows of least error within a budget.

    `dit_sparse.pipelines.calibrate_windows` does the same while a pipeline runs.

    Args:
        samples: calls of all layers, numbered from 0; any number for each, such as some steps of
            some prompts. They are looked at one by one and not kept.
        layout: their sequence.
        candidates: windows in tiles.
        tile: tokens of a tile.
        budget: mean cost of a head, in the unit of `costs`.
        costs: of each candidate, such as measured seconds of its plan; its density by default.
        block: tokens a block holds at most.
        segments: of every denoising step, where samples have several.

    Raises:
        ValueError: no samples of some layer, a budget below the cheapest candidate, or costs of
            another number.
    """
    if not candidates:
        raise ValueError("Expected candidates to choose from, got none.")
    plans = plans_of(layout, candidates, tile, block)
    shares = [plan.density for plan in plans]
    if costs is not None and len(costs) != len(candidates):
        raise ValueError(
            f"Expected a cost for each of {len(candidates)} candidates, got {len(costs)}."
        )
    totals: dict[Place, Tensor] = {}
    calls: Counter[Place] = Counter()
    for sample in samples:
        place, added = (sample.segment, sample.layer), head_errors(sample, layout, plans)
        totals[place] = totals[place] + added if place in totals else added
        calls[place] += 1
    errors = {place: total / calls[place] for place, total in totals.items()}
    choice = Choice(layout.grid, tile, tuple(candidates), tuple(shares), tuple(costs or shares))
    return choice.table(errors, budget, segments)


class Choice(NamedTuple):
    """What windows are chosen from.

    Args:
        grid: of the picture.
        tile: tokens of a tile.
        candidates: windows in tiles.
        shares: the density of each.
        costs: of each, in any unit.
    """

    grid: TokenGrid
    tile: Extents
    candidates: tuple[Extents, ...]
    shares: tuple[float, ...]
    costs: tuple[float, ...]

    def table(
        self, errors: Mapping[Place, Tensor], budget: float, segments: tuple[int, ...] = ()
    ) -> WindowTable:
        """The table of least error whose mean cost, over steps, layers and heads, is in a budget.

        Args:
            errors: float64 `[H, candidates]`, mean over calls.
            budget: in the unit of the costs.
            segments: of every step; each counts with its number of steps.

        Raises:
            ValueError: a layer without errors, or a budget below the cheapest candidate.
        """
        seen, layers = (sorted({place[axis] for place in errors}) for axis in (0, 1))
        if not layers or set(errors) != set(itertools.product(seen, range(len(layers)))):
            raise ValueError(
                f"Expected samples of layers 0, 1, 2 and so on, got layers {layers}. Record "
                "every attention module of the transformer."
            )
        stacked = torch.stack([torch.stack([errors[s, n] for n in layers]) for s in seen])
        steps = torch.tensor([float(segments.count(s) or 1) for s in seen], dtype=torch.float64)
        weights = (steps / steps.mean())[:, None, None]
        shares, costs = (torch.tensor(x, dtype=torch.float64) for x in (self.shares, self.costs))
        chosen = choose(stacked, costs, budget, weights)
        found = {
            segment: tuple(tuple(self.candidates[c] for c in heads) for heads in of_layers)
            for segment, of_layers in zip(seen, chosen.tolist(), strict=True)
        }
        error = (weights * stacked.gather(-1, chosen[..., None])[..., 0]).mean()
        return WindowTable(
            grid=self.grid,
            tile=self.tile,
            windows=tuple(found.get(s, ()) for s in range(max(*segments, *seen, 0) + 1)),
            density=float((weights * shares[chosen]).mean()),
            error=float(error),
            segments=segments,
            provenance={"cost": float((weights * costs[chosen]).mean())},
        )


def choose(errors: Tensor, costs: Tensor, budget: float, weights: Tensor | None = None) -> Tensor:
    """The candidate of each head.

    Args:
        errors: float64 `[..., candidates]`.
        costs: float64 `[candidates]`.
        budget: mean cost at most.
        weights: of the heads in that mean and in the sum of errors, with a mean of 1, float64 that
            broadcasts to `[...]`.

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

    def at(price: float) -> Tensor:  # weights would multiply both terms
        return by_cost[(errors + price * costs)[..., by_cost].argmin(-1)]

    def fits(chosen: Tensor) -> bool:
        spent = costs[chosen] if weights is None else weights * costs[chosen]
        return float(spent.mean()) <= budget * (1 + 1e-12)

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
    """Mean squared difference from dense attention, float64 `[H, plans]` on the CPU."""
    _, q, k, v, _ = sample
    exact = dense_attention(q, k, v, layout=layout).float()
    # What backends make of a plan stays with the object, so that it is moved only where it must.
    near = [plan if plan.device == q.device else plan.to(q.device) for plan in plans]
    found = [(attend(q, k, v, plan).out.float() - exact).square().mean((0, 2, 3)) for plan in near]
    return torch.stack(found, dim=-1).double().cpu()


def plans_of(
    layout: TokenLayout,
    candidates: Iterable[Extents],
    tile: Extents,
    block: int,
    device: torch.device | str = "cpu",
) -> list[BlockPlan]:
    """The plan of each candidate."""
    nothing = torch.empty(0, device=device)
    return [
        SlidingTileMethod(window=window, tile=tile, block=block).plan(
            nothing, nothing, CallContext(layout)
        )
        for window in candidates
    ]
