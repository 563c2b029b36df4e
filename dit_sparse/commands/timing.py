"""Times denoising alone, from the forwards of a pipeline's transformers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any

import torch
from torch import nn

Mark = float | torch.cuda.Event


@dataclass(eq=False)
class DenoisingTimer:
    """Notes when every transformer forward begins and ends; a context manager.

    Denoising lasts from the first forward's beginning to the last one's end: prompt encoding and
    decoding stay out, guidance and the scheduler between forwards stay in. On a GPU the marks are
    CUDA events, so nothing waits for the device until `seconds` is read.

    Args:
        transformers: those that the pipeline calls.
        device: where they compute.
    """

    transformers: Sequence[nn.Module]
    device: torch.device
    begins: list[Mark] = field(default_factory=list)
    ends: list[Mark] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> DenoisingTimer:
        for transformer in self.transformers:
            # First in line, so that reading the layout and planning are part of the time.
            before = transformer.register_forward_pre_hook(self._begin, prepend=True)
            self._handles += [before, transformer.register_forward_hook(self._end)]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def seconds(self) -> float:
        """Seconds of denoising; 0 if no transformer ran."""
        return self._between(self.begins[0], self.ends[-1]) if self.ends else 0.0

    def mark(self) -> Mark:
        """A mark of this moment, for `before`."""
        return self._mark()

    def before(self, mark: Mark) -> float:
        """Seconds from a mark to the first forward; 0 if no transformer ran."""
        return self._between(mark, self.begins[0]) if self.begins else 0.0

    def step_seconds(self, steps: int) -> list[float]:
        """Seconds of each step: from its first forward to that of the next step.

        Empty when the forwards do not divide into `steps` equal groups (a scheduler of higher
        order, an interrupted run), because then no forward is known to begin a step.
        """
        if steps < 1 or not self.ends or len(self.begins) % steps:
            return []
        marks = [*self.begins[:: len(self.begins) // steps], self.ends[-1]]
        return [self._between(a, b) for a, b in pairwise(marks)]

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self.begins.append(self._mark())

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.ends.append(self._mark())

    def _mark(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, first: Mark, last: Mark) -> float:
        if isinstance(first, float) or isinstance(last, float):
            return float(last) - float(first)  # type: ignore[arg-type]
        last.synchronize()
        return first.elapsed_time(last) / 1000
