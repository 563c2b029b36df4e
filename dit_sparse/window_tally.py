"""What a search of windows adds up while the dense model runs, and keeps when interrupted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from dit_sparse import options, per_axis
from dit_sparse.grid import TokenLayout
from dit_sparse.method import CallContext
from dit_sparse.model_identity import ModelIdentity
from dit_sparse.plan import BlockPlan
from dit_sparse.progress_file import read_progress, write_progress
from dit_sparse.step_segments import Split, segment_table
from dit_sparse.tally import Facts
from dit_sparse.window_candidates import estimated, everything, measured, tile_for, windows_for
from dit_sparse.window_search import Choice, Place, Sample, head_errors, plans_of
from dit_sparse.window_table import WindowTable

_KEY = "dit_sparse.window_progress"


@dataclass(frozen=True)
class WindowBudget:
    """What the windows of all heads may cost together: one of the two.

    Args:
        density: mean share of blocks that is read.
        time: mean share of the time that reading everything takes, measured on a GPU for each
            candidate, elsewhere estimated.

    Raises:
        ValueError: both, neither, or a number out of range.
    """

    density: float | None = None
    time: float | None = None

    def __post_init__(self) -> None:
        options.check_one_share("as the budget of windows", "density", "time", vars(self))


@dataclass(frozen=True)
class WindowSettings:
    """How windows are searched.

    Args:
        segments: parts of the generation with windows of their own.
        split: see `step_segments.segment_table`.
        block: tokens of a block: 64 or 128.
        every: errors are added up at every so many steps, and at the first of each segment.
        tile: tokens of a tile along (frames, height, width); by default chosen for the grid.
        windows: candidates in tiles; by default `window_candidates.windows_for`.
        seed: of the initial noise of the first prompt; the next one has the next number.

    Raises:
        ValueError: numbers or names out of range.
    """

    segments: int = 4
    split: Split = "uniform"
    block: int = 128
    every: int = 1
    tile: tuple[int, ...] | None = None
    windows: tuple[tuple[int, ...], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("segments", "every"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"Expected {name} to be an integer of at least 1, got {value!r}.")
        options.check_block(self.block)
        options.check_choice("split", self.split, get_args(Split))
        if self.tile is not None:
            object.__setattr__(self, "tile", per_axis.counts(self.tile, "tile"))
        windows = tuple(per_axis.counts(w, "window", unit="tile") for w in self.windows)
        object.__setattr__(self, "windows", tuple(dict.fromkeys(windows)))
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise ValueError(f"Expected a seed from 0 to 2**63 - 1, got {self.seed!r}.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(eq=False)
class WindowTally:
    """Errors of candidates summed over calls, prompt by prompt.

    Args:
        settings: of the search.
        facts: of the calls, once one was seen, and with it:
        choice: the candidates; costs are shares of the time that reading everything takes.
        costs_from: how they were found, and the times.
        errors: by segment and layer, float64 `[H, candidates]`: sums over calls.
        calls: how many.
        finished: generations that are part of it.
    """

    settings: WindowSettings
    facts: Facts | None = None
    choice: Choice | None = None
    costs_from: dict[str, Any] = field(default_factory=dict)
    errors: dict[Place, Tensor] = field(default_factory=dict)
    calls: Counter[Place] = field(default_factory=Counter)
    finished: int = 0
    _planned: tuple[TokenLayout, torch.device, list[BlockPlan]] | None = None

    def add(self, q: Tensor, k: Tensor, ctx: CallContext, segment: int) -> None:
        """Adds the errors of a call.

        Args:
            q, k: `[B, H, N, D]` in the model's order; v is that of the context.
            segment: of the call's step.

        Raises:
            ValueError: another grid, size of the model or number of steps than before.
        """
        v = ctx.values
        assert v is not None  # a session gives it
        self.facts = Facts.of(q, ctx, self.facts)
        if self.choice is None:
            self._begin(q, k, v, ctx.layout)
        found = head_errors(Sample(ctx.layer, q, k, v), ctx.layout, self._plans(q, ctx.layout))
        place = (segment, ctx.layer)
        self.errors[place] = self.errors[place] + found if place in self.errors else found
        self.calls[place] += 1

    def _begin(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> None:
        """Candidates and their costs, once the grid is known."""
        grid, settings = layout.grid, self.settings
        segment_table(self.facts.steps if self.facts else 1, settings.segments, settings.split)
        tile = settings.tile or tile_for(grid, settings.block)
        tile = per_axis.clipped(tile, "tile", grid)
        ranked = (per_axis.of_rank(w, "window", grid) for w in settings.windows)
        given = tuple((int(f), int(h), int(w)) for f, h, w in ranked)
        candidates = given or windows_for(grid, tile)
        self.choice = Choice(grid, tile, candidates, (), ())
        plans = self._plans(q, layout)
        compared = [*plans, everything(layout, settings.block, q.device)]
        if q.device.type == "cuda":
            times, unit = measured(q, k, v, compared), "milliseconds of a call"
            source = f"measured on {torch.cuda.get_device_name(q.device)}"
        else:
            times, unit = estimated(compared), "microseconds of a multiprocessor and a head"
            source = "estimated by block_times for an H200, not measured"
        shares = tuple(plan.density for plan in plans)
        costs = tuple(time / times[-1] for time in times[:-1])
        self.choice = self.choice._replace(shares=shares, costs=costs)
        self.costs_from = {"source": source, "unit": unit, "everything": times[-1]}

    def _plans(self, q: Tensor, layout: TokenLayout) -> list[BlockPlan]:
        """The candidates' plans; those of the latest layout are kept."""
        assert self.choice is not None
        known = self._planned
        if known is None or known[:2] != (layout, q.device):
            _, tile, candidates, _, _ = self.choice
            plans = plans_of(layout, candidates, tile, self.settings.block, q.device)
            known = self._planned = (layout, q.device, plans)
        return known[2]

    def table(
        self, budget: WindowBudget, model: ModelIdentity, provenance: Mapping[str, Any]
    ) -> WindowTable:
        """The windows of least error in a budget.

        Raises:
            ValueError: the budget is below the cheapest candidate.
        """
        choice, facts, settings = self.choice, self.facts, self.settings
        assert choice is not None  # a generation was run
        assert facts is not None
        errors = {place: total / self.calls[place] for place, total in self.errors.items()}
        segments = segment_table(facts.steps, settings.segments, settings.split)
        by_time = budget.density is None
        costs = choice.costs if by_time else choice.shares
        limit = budget.time if by_time else budget.density
        assert limit is not None
        found = choice._replace(costs=costs).table(errors, limit, segments)
        candidates = [
            {"window": window, "density": share, "cost": cost}
            for window, share, cost in zip(*choice[2:], strict=True)
        ]
        more = {
            "budget": asdict(budget),
            "cost": float(self._mean_cost(found)),
            "costs": self.costs_from,
            "candidates": candidates,
            "settings": settings.to_dict(),
            "text": facts.text,
            "steps": facts.steps,
        }
        return WindowTable(
            *(found.grid, found.tile, found.windows, found.density, found.error),
            segments=segments,
            model=model,
            provenance=dict(provenance) | more,
        )

    def _mean_cost(self, table: WindowTable) -> Tensor:
        """Mean share of the time that reading everything takes, over steps, layers and heads."""
        assert self.choice is not None
        cost = dict(zip(self.choice.candidates, self.choice.costs, strict=True))
        of_steps = [
            torch.tensor([[cost[w] for w in heads] for heads in table.windows[segment]])
            for segment in table.segments
            if table.windows[segment]
        ]
        return torch.stack(of_steps).mean()

    def save(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Writes what was added up, whole or not at all.

        Args:
            settings: what it was made with; plain values.
        """
        assert self.choice is not None
        header = {
            "settings": dict(settings),
            "facts": self.facts and self.facts.to_dict(),
            "choice": self.choice[1:],
            "costs_from": self.costs_from,
            "calls": [[*place, count] for place, count in self.calls.items()],
            "finished": self.finished,
        }
        tensors = {f"{s}.{layer}": total for (s, layer), total in self.errors.items()}
        write_progress(path, _KEY, header, tensors)

    @classmethod
    def load(
        cls, path: Path, settings: Mapping[str, Any], measuring: WindowSettings
    ) -> WindowTally:
        """What `save` wrote, or an empty tally where there is no file.

        Args:
            settings: as for `save`.
            measuring: those of the search.

        Raises:
            ValueError: the file is damaged, or was made with other settings.
        """
        found = read_progress(path, _KEY, settings)
        if found is None:
            return cls(measuring)
        header, tensors = found
        tile, candidates, shares, costs = header["choice"]
        facts = Facts.of_dict(header["facts"])
        windows = tuple((f, h, w) for f, h, w in candidates)
        errors = {}
        for name, total in tensors.items():
            segment, layer = map(int, name.split("."))
            errors[segment, layer] = total
        return cls(
            measuring,
            facts,
            Choice(facts.grid, (tile[0], tile[1], tile[2]), windows, tuple(shares), tuple(costs)),
            header["costs_from"],
            errors,
            Counter({(s, layer): count for s, layer, count in header["calls"]}),
            header["finished"],
        )
