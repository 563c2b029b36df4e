"""`dit-sparse calibrate`: finds orders and block masks for a model and keeps them in a folder."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_sparse.calibration import Calibration
from dit_sparse.calibration_solver import Settings, Target
from dit_sparse.commands.call import call_arguments, check_counts
from dit_sparse.commands.models import open_model
from dit_sparse.commands.words import among
from dit_sparse.pipelines.calibrate import calibrate as measure

METHODS = ("paro",)


@dataclass(frozen=True)
class Request:
    """What to calibrate. `None` leaves a choice to the model's pipeline.

    Args:
        model: see `dit_sparse.commands.models.open_model`.
        method: one that needs a calibration.
        prompts: a generation each, and one more of the first.
        target: what masks are to reach.
        settings: how to measure.
        output: folder of the result, and of what an interrupted calibration has finished.
        component: the transformer, where the pipeline has several.
        steps, height, width, frames, guidance, negative_prompt: arguments of the pipeline.
        quiet: no progress bars.
    """

    model: str
    method: str
    prompts: tuple[str, ...]
    target: Target
    settings: Settings
    output: Path
    device: torch.device
    dtype: torch.dtype
    component: str | None = None
    negative_prompt: str | None = None
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    guidance: float | None = None
    offload: str = "none"
    quiet: bool = False

    def __post_init__(self) -> None:
        among(self.method, METHODS, "--method")
        check_counts(self)
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"Expected a folder for --output, got the file {str(self.output)!r}.")


@dataclass(frozen=True)
class Report:
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


def calibrate(request: Request) -> Report:
    """Runs the dense model and writes the calibration.

    Raises:
        ValueError: something in the request is wrong.
    """
    model = open_model(
        request.model, device=request.device, dtype=request.dtype, offload=request.offload
    )
    given = call_arguments(request)
    calls = [model.arguments(p, request.negative_prompt, given) for p in request.prompts]
    model.pipeline.set_progress_bar_config(disable=request.quiet, leave=False)
    found = measure(
        model.pipeline,
        calls,
        density=request.target.density,
        mass=request.target.mass,
        settings=request.settings,
        component=request.component,
        model=model.name,
        folder=request.output,
        progress=not request.quiet,
    )
    found.save_pretrained(request.output)
    return Report(request.output, found)
