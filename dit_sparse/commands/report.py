"""What `dit-sparse sample` says at the end, as text and as JSON."""

from __future__ import annotations

import math
import platform
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

import dit_sparse
from dit_sparse.method import SparseMethod
from dit_sparse.record import Summary

if TYPE_CHECKING:
    from dit_sparse.commands.models import Model
    from dit_sparse.commands.sample import Request


@dataclass(frozen=True)
class Comparison:
    """The same generation with dense attention.

    Args:
        output: its file.
        denoising_seconds, seconds_per_step: of the dense run.
        speedup: dense denoising time over sparse denoising time.
        psnr_db: of the sparse frames against the dense ones; infinite when they are equal.
    """

    output: str
    denoising_seconds: float
    seconds_per_step: float
    speedup: float
    psnr_db: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: `psnr_db` is None when the frames are equal."""
        equal = math.isinf(self.psnr_db)
        return asdict(self) | {"psnr_db": None if equal else self.psnr_db, "identical": equal}

    def __str__(self) -> str:
        psnr = "identical" if math.isinf(self.psnr_db) else f"PSNR {self.psnr_db:.2f} dB"
        return (
            f"speedup {self.speedup:.2f}x over {self.seconds_per_step:.4f} s per step, "
            f"{psnr}, {self.output}"
        )


@dataclass(frozen=True)
class Result:
    """One generation.

    Args:
        prompt: what was asked for.
        output: the file written.
        size: frames, height and width in pixels.
        steps: timesteps of the scheduler.
        denoising_seconds: from the first transformer forward to the end of the last.
        seconds_per_step: denoising seconds over steps.
        step_seconds: of each step; empty when forwards cannot be told apart by step.
        total_seconds: of the whole pipeline call, prompt encoding and decoding included.
        attention: what ran.
        dense: the dense run beside it, if one was asked for.
    """

    prompt: str
    output: str
    size: tuple[int, int, int]
    steps: int
    denoising_seconds: float
    seconds_per_step: float
    step_seconds: tuple[float, ...]
    total_seconds: float
    attention: Summary
    dense: Comparison | None

    @property
    def overall_density(self) -> float:
        """Measured density over all self-attention calls, a dense call counting 1."""
        calls = self.attention.sparse + self.attention.dense
        sparse = self.attention.sparse * (self.attention.density or 0.0)
        return (sparse + self.attention.dense) / calls if calls else 1.0

    def to_dict(self) -> dict[str, Any]:
        plain = {k: v for k, v in vars(self).items() if k not in ("attention", "dense")}
        return plain | {
            "overall_density": self.overall_density,
            "attention": self.attention.to_dict(),
            "dense": None if self.dense is None else self.dense.to_dict(),
        }

    def __str__(self) -> str:
        ran = self.attention
        frames, height, width = self.size
        lines = [
            f"{self.output}: {frames} x {width}x{height}, {self.prompt!r}",
            f"  time       {self.seconds_per_step:.4f} s per step ({self.steps} steps "
            f"{self.denoising_seconds:.2f} s; in all {self.total_seconds:.2f} s)",
            f"  density    {self.overall_density:.3f} measured over all self-attention calls",
            f"  sparse     {ran.sparse} of {ran.sparse + ran.dense} calls",
        ]
        if ran.density is not None:
            lines[-1] += f", density {ran.density:.3f}, backend {', '.join(ran.backends)}"
        if ran.backends == ("reference",):
            lines.append("  note       the reference backend shows the result, not the speed")
        lines += [f"  dense      {count} calls: {why}" for why, count in ran.reasons.items()]
        lines += [f"  not used   {refusal}" for refusal in ran.refusals]
        if self.dense is not None:
            lines.append(f"  compared   {self.dense}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """All generations of one command, and where they were made.

    Args:
        model, pipeline: the model as named and its pipeline class.
        method: the method with its options.
        device, dtype, versions: where the times were measured.
        seed: of the initial noise of every result.
        compiled: whether the transformers' blocks were compiled.
        warmup_seconds: time spent before the first result, in no other figure.
        results: one per prompt.
    """

    model: str
    pipeline: str
    method: str
    device: str
    dtype: str
    versions: dict[str, str]
    seed: int
    compiled: bool
    warmup_seconds: float
    results: tuple[Result, ...]

    @staticmethod
    def of(
        request: Request,
        method: SparseMethod,
        model: Model,
        warmup: float,
        results: tuple[Result, ...],
    ) -> Report:
        gpu = request.device.type == "cuda"
        return Report(
            model=request.model,
            pipeline=type(model.pipeline).__name__,
            method=describe(method),
            device=torch.cuda.get_device_name(request.device) if gpu else platform.machine(),
            dtype=str(request.dtype).removeprefix("torch."),
            versions={"dit-sparse": dit_sparse.__version__, "torch": torch.__version__},
            seed=request.seed,
            compiled=request.compile,
            warmup_seconds=warmup,
            results=results,
        )

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"results": [result.to_dict() for result in self.results]}

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.model} ({self.pipeline}), {self.method}",
                f"{self.device}, {self.dtype}, {'compiled, ' if self.compiled else ''}"
                f"seed {self.seed}, warm-up {self.warmup_seconds:.2f} s",
                *map(str, self.results),
            ]
        )


def describe(method: SparseMethod) -> str:
    """A method with the options that differ from their defaults: `window(density=0.3)`."""
    chosen = []
    for option in fields(method):  # type: ignore[arg-type]  # methods are dataclasses
        value = getattr(method, option.name)
        if value != option.default:
            inner = isinstance(value, SparseMethod)
            chosen.append(describe(value) if inner else f"{option.name}={value}")
    return f"{method.name}({', '.join(chosen)})"
