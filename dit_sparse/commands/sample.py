"""`dit-sparse sample`: makes pictures with a sparse attention method and says what that cost."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from dit_sparse import attention, media
from dit_sparse.backend import Precision
from dit_sparse.commands.call import call_arguments, check_counts
from dit_sparse.commands.methods import Wording, wording_on
from dit_sparse.commands.models import Model, open_model
from dit_sparse.commands.report import Comparison, Report, Result
from dit_sparse.commands.timing import DenoisingTimer
from dit_sparse.commands.words import among, at_least
from dit_sparse.method import SparseMethod
from dit_sparse.methods import create
from dit_sparse.methods.schedule import Schedule
from dit_sparse.pipelines.apply import apply, summary
from dit_sparse.pipelines.compile import compile_blocks

logger = logging.getLogger("dit_sparse")


@dataclass(frozen=True)
class Request:
    """What to sample. `None` leaves a choice to the model's pipeline.

    Args:
        model: see `dit_sparse.commands.models.open_model`.
        prompts: one result each.
        method: of the transformers' self-attention, in words that the model's family completes.
        output: file of the result; several are numbered. Suffixes: `dit_sparse.media`.
        steps, height, width, frames, guidance, negative_prompt: arguments of the pipeline.
        seed: of the initial noise, the same for every prompt.
        backend: name of the only sparse backend to use.
        precision: what sparse calls multiply in; see `dit_sparse.apply`.
        compare: run dense attention too, with the same noise.
        compile: compile the transformers' repeated blocks.
        warmup: steps to run untimed before the first result.
        quiet: no progress bars.
    """

    model: str
    prompts: tuple[str, ...]
    method: Wording
    output: Path | None
    device: torch.device
    dtype: torch.dtype
    negative_prompt: str | None = None
    steps: int | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    guidance: float | None = None
    offload: str = "none"
    backend: str | None = None
    precision: Precision = "bf16"
    fps: float = 16.0
    compare: bool = False
    compile: bool = False
    warmup: int = 1
    quiet: bool = False

    def __post_init__(self) -> None:
        check_counts(self)
        self.method.method()  # refuses what no family could mend
        at_least(self.warmup, 0, "--warmup")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"Expected --seed from 0 to 2**63 - 1, got {self.seed}.")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ValueError(f"Expected a finite --guidance, got {self.guidance}.")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"Expected a positive --fps, got {self.fps}.")
        among(self.precision, get_args(Precision), "--precision")
        attention.check_backend(self.backend, self.precision)
        if self.output is not None:
            media.check_output(self.output)


@dataclass(frozen=True, eq=False)
class _Run:
    """One generation: frames `[F, H, W, 3]` in 0..1, and its times in seconds."""

    frames: np.ndarray
    denoising: float
    steps: int
    step_seconds: list[float]
    total: float


def sample(request: Request) -> Report:
    """Makes one picture or clip per prompt.

    Raises:
        ValueError: something in the request is wrong. Everything that can be known before
            sampling is checked before sampling.
    """
    model = open_model(
        request.model, device=request.device, dtype=request.dtype, offload=request.offload
    )
    method = wording_on(request.method, model).method()
    output = _output(request.output, model)
    given = call_arguments(request)
    calls = [model.arguments(p, request.negative_prompt, given) for p in request.prompts]
    reduction = model.reduction(given)
    if reduction is not None:
        logger.warning(reduction)
    paths = media.numbered(output, len(calls))
    for path in paths:
        media.check_output(path)
    model.pipeline.set_progress_bar_config(disable=request.quiet, leave=False)
    if request.compile:
        for transformer in model.transformers:
            compile_blocks(transformer)
    started = time.perf_counter()
    _warm_up(model, request, method, calls[0])
    warm = time.perf_counter() - started
    results = tuple(
        _result(model, request, method, prompt, call, path)
        for prompt, call, path in zip(request.prompts, calls, paths, strict=True)
    )
    return Report.of(request, method, model, warm, results)


def _output(path: Path | None, model: Model) -> Path:
    if path is None:
        return Path("sample.mp4" if model.makes_video else "sample.png")
    if not model.makes_video and path.suffix.lower() in media.VIDEO_SUFFIXES:
        raise ValueError(
            f"Expected a .png for the images of {type(model.pipeline).__name__}, got {str(path)!r}."
        )
    return path


def _warm_up(model: Model, request: Request, method: SparseMethod, call: Mapping[str, Any]) -> None:
    """Compiles and tunes what the timed runs use, sparse kernels and dense ones."""
    if not request.warmup:
        return
    short = {**call, "num_inference_steps": request.warmup}
    scheduled = isinstance(method, Schedule)
    methods = [method.method if isinstance(method, Schedule) else method]
    if scheduled or request.compare:
        methods.append(create("dense"))
    for each in methods:
        apply(model.pipeline, each, backend=request.backend, precision=request.precision)
        model.pipeline(**short, generator=_noise(request), output_type="latent")


def _result(
    model: Model,
    request: Request,
    method: SparseMethod,
    prompt: str,
    call: Mapping[str, Any],
    path: Path,
) -> Result:
    apply(model.pipeline, method, backend=request.backend, precision=request.precision)
    run = _run(model, request, call)
    ran = summary(model.pipeline)
    media.write(path, run.frames, fps=request.fps)
    comparison = None
    if request.compare:
        apply(model.pipeline, "dense")
        dense = _run(model, request, call)
        beside = path.with_stem(f"{path.stem}-dense")
        media.write(beside, dense.frames, fps=request.fps)
        comparison = Comparison(
            output=str(beside),
            denoising_seconds=dense.denoising,
            seconds_per_step=dense.denoising / dense.steps,
            speedup=dense.denoising / run.denoising,
            psnr_db=psnr(run.frames, dense.frames),
        )
    frames, height, width, _ = run.frames.shape
    return Result(
        prompt=prompt,
        output=str(path),
        size=(frames, height, width),
        steps=run.steps,
        denoising_seconds=run.denoising,
        seconds_per_step=run.denoising / run.steps,
        step_seconds=tuple(run.step_seconds),
        total_seconds=run.total,
        attention=ran,
        dense=comparison,
    )


def _run(model: Model, request: Request, call: Mapping[str, Any]) -> _Run:
    started = time.perf_counter()
    with DenoisingTimer(model.transformers, request.device) as timer:
        output = model.pipeline(**call, generator=_noise(request), output_type="np")
    denoising = timer.seconds()  # waits for the device
    total = time.perf_counter() - started
    frames = output.frames[0] if model.makes_video else output.images
    if not np.isfinite(frames).all():
        raise ValueError(
            f"Expected finite frames, got NaN from {request.model} in {request.dtype}. "
            "Try --dtype float32 or bfloat16."
        )
    steps = len(model.pipeline.scheduler.timesteps)
    return _Run(np.asarray(frames), denoising, steps, timer.step_seconds(steps), total)


def _noise(request: Request) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(request.seed)  # the same noise on every device


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two arrays in 0..1; infinite when they are equal."""
    error = float(np.square(a.astype(np.float64) - b).mean())
    return math.inf if error == 0 else -10 * math.log10(error)
