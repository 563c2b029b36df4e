"""One generation: its frames, and how long its parts took."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dit_sparse import media
from dit_sparse.commands.models import Model
from dit_sparse.commands.timing import DenoisingTimer
from dit_sparse.evaluation.variants import Variant
from dit_sparse.pipelines.apply import apply, remove, summary
from dit_sparse.pipelines.stock_backend import stock_backend
from dit_sparse.record import Summary


@dataclass(frozen=True)
class Seconds:
    """Where the time of a generation went.

    Args:
        encode: before the first forward of a transformer: text encoders, initial noise.
        denoise: from there to the end of the last forward.
        decode: the rest: autoencoder, copying frames to the host.
        steps: of each denoising step, where forwards can be told apart by step.
    """

    encode: float
    denoise: float
    decode: float
    steps: tuple[float, ...]

    @property
    def total(self) -> float:
        return self.encode + self.denoise + self.decode

    def to_dict(self) -> dict[str, Any]:
        """Plain values, rounded to microseconds."""
        parts = {name: round(getattr(self, name), 6) for name in ("encode", "denoise", "decode")}
        steps = [round(step, 6) for step in self.steps]
        return {**parts, "total": round(self.total, 6), "steps": steps}


@dataclass(frozen=True, eq=False)
class Generation:
    """A clip and what it cost.

    Args:
        frames: uint8 `[F, H, W, 3]`.
        seconds: of its parts.
        steps: timesteps of the scheduler.
        peak_bytes: most memory that tensors took on the GPU; `None` elsewhere.
        record: what the attention ran; `None` of stock processors.
    """

    frames: np.ndarray
    seconds: Seconds
    steps: int
    peak_bytes: int | None
    record: Summary | None

    @property
    def density(self) -> float:
        """Measured density over all self-attention calls, a dense call counting 1."""
        if self.record is None:
            return 1.0
        calls = self.record.sparse + self.record.dense
        sparse = self.record.sparse * (self.record.density or 0.0)
        return (sparse + self.record.dense) / calls if calls else 1.0


def install(model: Model, variant: Variant) -> None:
    """Makes the pipeline run a variant's processors, whatever it ran before."""
    remove(model.pipeline)
    if variant.method is not None:
        apply(model.pipeline, variant.method, precision=variant.precision)


def generate(model: Model, variant: Variant, call: Mapping[str, Any], seed: int) -> Generation:
    """Runs a variant that was installed. On a GPU, waits for it before and after.

    Raises:
        ValueError: the frames are not finite or not in 0..1, or the model's attention has no
            choice of backends.
    """
    device = torch.device(model.pipeline._execution_device)
    gpu = device.type == "cuda"
    noise = torch.Generator("cpu").manual_seed(seed)  # the same noise on every device
    if gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    kernel = stock_backend(model.transformers, variant.kernel)
    with kernel, DenoisingTimer(model.transformers, device) as timer:
        mark = timer.mark()
        output = model.pipeline(**call, generator=noise, output_type="np")
    if gpu:
        torch.cuda.synchronize(device)
    total = time.perf_counter() - begin
    frames = np.asarray(output.frames[0] if model.makes_video else output.images)
    encode, denoise = timer.before(mark), timer.seconds()
    steps = len(model.pipeline.scheduler.timesteps)
    return Generation(
        frames=media.as_bytes(frames),
        seconds=Seconds(
            encode=encode,
            denoise=denoise,
            decode=max(0.0, total - encode - denoise),
            steps=tuple(timer.step_seconds(steps)),
        ),
        steps=steps,
        peak_bytes=torch.cuda.max_memory_allocated(device) if gpu else None,
        record=None if variant.method is None else summary(model.pipeline),
    )
