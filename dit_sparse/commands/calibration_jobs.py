"""What `dit-sparse calibrate` can find: PARO's orders and masks, STA's windows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dit_sparse.calibration import Calibration
from dit_sparse.calibration_solver import Settings, Target
from dit_sparse.pipelines.calibrate import calibrate
from dit_sparse.pipelines.calibrate_windows import calibrate_windows
from dit_sparse.window_table import TABLE, WindowTable, save_table
from dit_sparse.window_tally import WindowBudget, WindowSettings


@dataclass(frozen=True)
class Place:
    """Where a calibration happens.

    Args:
        model: what to call it in the result.
        component: the transformer, where the pipeline has several.
        folder: of the result.
        progress: show a progress bar.
    """

    model: str
    component: str | None
    folder: Path
    progress: bool


class Job(Protocol):
    """What to find."""

    def run(self, pipeline: Any, calls: Sequence[Mapping[str, Any]], place: Place) -> Report:
        """Runs the dense pipeline, a generation for each of the calls, and writes the result."""
        ...


class Report(Protocol):
    """What was found, as text too."""

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class ParoJob:
    """Orders and block masks.

    Args:
        target: what masks are to reach.
        settings: how to measure.
    """

    target: Target
    settings: Settings

    def run(self, pipeline: Any, calls: Sequence[Mapping[str, Any]], place: Place) -> ParoReport:
        found = calibrate(
            pipeline,
            calls,
            density=self.target.density,
            mass=self.target.mass,
            settings=self.settings,
            component=place.component,
            model=place.model,
            folder=place.folder,
            progress=place.progress,
        )
        found.save_pretrained(place.folder)
        return ParoReport(place.folder, found)


@dataclass(frozen=True)
class StaJob:
    """Windows of whole tiles for each head.

    Args:
        budget: what they may cost together.
        settings: how to search.
    """

    budget: WindowBudget
    settings: WindowSettings

    def run(self, pipeline: Any, calls: Sequence[Mapping[str, Any]], place: Place) -> StaReport:
        found = calibrate_windows(
            pipeline,
            calls,
            density=self.budget.density,
            time=self.budget.time,
            settings=self.settings,
            component=place.component,
            model=place.model,
            folder=place.folder,
            progress=place.progress,
        )
        place.folder.mkdir(parents=True, exist_ok=True)
        save_table(found, place.folder / TABLE)
        return StaReport(place.folder, found)


@dataclass(frozen=True)
class ParoReport:
    """What was found.

    Args:
        output: folder of the calibration.
        calibration: as it was saved.
    """

    output: Path
    calibration: Calibration

    @property
    def orders(self) -> dict[str, int]:
        """How many heads have each order."""
        found = self.calibration
        names = (name for layer in range(found.layers) for name in found.order_names(layer))
        return dict(Counter(names).most_common())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found = self.calibration
        seen = sorted(found.masks)
        return {
            "output": str(self.output),
            "method": "paro",
            "model": found.model.to_dict(),
            "grid": list(found.grid.shape),
            "steps": found.steps,
            "segments": list(found.segments),
            "layers": found.layers,
            "heads": found.heads,
            "orders": self.orders,
            "density": float(found.density[seen].mean()),
            "kept_mass": {
                "mean": float(found.kept_mass[seen].mean()),
                "least": float(found.kept_mass[seen].min()),
            },
            "dense_heads": [list(place) for place in found.dense_heads],
        }

    def __str__(self) -> str:
        values = self.to_dict()
        mass = values["kept_mass"]
        orders = ", ".join(f"{name} {count}" for name, count in self.orders.items())
        return "\n".join(
            [
                str(self.calibration),
                f"orders: {orders}",
                f"kept mass: {mass['mean']:.3f} on average, {mass['least']:.3f} at least",
                *_listed(self.calibration.dense_heads),
                f"use it: --method paro --option path={self.output}",
            ]
        )


def _listed(dense: tuple[tuple[int, int, int], ...]) -> list[str]:
    """A line for each segment with heads that read everything: `layer.head` numbers."""
    lines = []
    for segment in sorted({place[0] for place in dense}):
        heads = [f"{layer}.{head}" for s, layer, head in dense if s == segment]
        lines.append(f"dense in segment {segment}: {' '.join(heads)}")
    return lines


@dataclass(frozen=True)
class StaReport:
    """Windows that were found.

    Args:
        output: folder of the table.
        table: as it was saved.
    """

    output: Path
    table: WindowTable

    @property
    def windows(self) -> dict[str, int]:
        """How many heads have each window, over all segments."""
        every = [w for layers in self.table.windows for heads in layers for w in heads]
        return {"x".join(map(str, w)): n for w, n in Counter(every).most_common()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found, known = self.table, self.table.provenance
        return {
            "output": str(self.output),
            "method": "sta",
            "model": found.model and found.model.to_dict(),
            "grid": list(found.grid.shape),
            "tile": list(found.tile),
            "steps": len(found.segments),
            "segments": list(found.segments),
            "layers": found.layers,
            "heads": found.heads,
            "windows": self.windows,
            "density": found.density,
            "cost": known["cost"],
            "costs": known["costs"],
            "candidates": known["candidates"],
            "error": found.error,
        }

    def __str__(self) -> str:
        found, known = self.table, self.table.provenance
        windows = ", ".join(f"{name} {count}" for name, count in self.windows.items())
        block = known["settings"]["block"]
        return "\n".join(
            [
                str(found),
                f"windows in tiles of {'x'.join(map(str, found.tile))} tokens: {windows}",
                f"mean squared error of a call: {found.error:.3g}",
                f"time of reading everything that remains: {known['cost']:.3f} "
                f"({known['costs']['source']})",
                f"use it: --method sta --option table={self.output}"
                + (f" --option block={block}" if block != 128 else ""),
            ]
        )
