"""`dit-sparse calibrate`: finds out for a model what a method needs, and keeps it in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_sparse.calibration_solver import Settings, Target
from dit_sparse.commands.calibration_jobs import Job, ParoJob, Place, Report, StaJob
from dit_sparse.commands.call import call_arguments, check_counts
from dit_sparse.commands.models import open_model
from dit_sparse.commands.words import among
from dit_sparse.window_tally import WindowBudget, WindowSettings

METHODS = ("paro", "sta")


@dataclass(frozen=True)
class Request:
    """What to calibrate. `None` leaves a choice to the model's pipeline.

    Args:
        model: see `dit_sparse.commands.models.open_model`.
        job: what to find; see `job_of`.
        prompts: a generation each; for PARO one more of the first.
        output: folder of the result, and of what an interrupted calibration has finished.
        component: the transformer, where the pipeline has several.
        steps, height, width, frames, guidance, negative_prompt: arguments of the pipeline.
        quiet: no progress bars.
    """

    model: str
    job: Job
    prompts: tuple[str, ...]
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
        check_counts(self)
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"Expected a folder for --output, got the file {str(self.output)!r}.")


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
    place = Place(model.name, request.component, request.output, not request.quiet)
    return request.job.run(model.pipeline, calls, place)


def job_of(
    method: str,
    *,
    density: float | None,
    shared: Mapping[str, Any],
    of_paro: Mapping[str, Any],
    of_sta: Mapping[str, Any],
) -> Job:
    """What the words of a command line ask for; `None` among them leaves a choice to the method.

    Args:
        shared: settings that both methods have.
        of_paro: mass, criterion, budget, least_mass.
        of_sta: time, tile, windows.

    Raises:
        ValueError: a method that needs no calibration, words of the other one, or bad values.
    """
    among(method, METHODS, "--method")
    own, other = (of_paro, of_sta) if method == "paro" else (of_sta, of_paro)
    strange = [name for name, value in other.items() if value is not None]
    if strange:
        flag = {"windows": "window"}.get(strange[0], strange[0].replace("_", "-"))
        raise ValueError(
            f"Expected options of {method}, got --{flag}, which is for "
            f"{METHODS[method == METHODS[0]]}. Leave it out."
        )
    words = {name: value for name, value in own.items() if value is not None}
    if method == "paro":
        target = Target(density, words.pop("mass", None))
        return ParoJob(target, Settings(**shared, **words))
    budget = WindowBudget(density, words.pop("time", None))
    return StaJob(budget, WindowSettings(**shared, **words))
