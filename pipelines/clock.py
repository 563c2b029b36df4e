"""Which denoising step a forward belongs to, told without waiting for the device if possible."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from torch import Tensor


class Moment(NamedTuple):
    """Where in a generation a forward stands.

    `step` counts from 0 and `steps` is their number; either is `None` when it cannot be known.
    `generation` counts the generations seen by the clock, so that a new one is noticed.
    """

    step: int | None
    steps: int | None
    generation: int


class StepClock:
    """Counts denoising steps for one transformer.

    With a pipeline whose scheduler counts (`step_index`), the scheduler is asked. Where it does
    not count, has not made its first step or has finished, the `timestep` argument is read, which
    waits for the device once per forward: it falls from step to step, stays for the calls within
    one, and a rise begins a generation. So a loop of one's own over a pipeline's transformer, or
    another pipeline with a scheduler of its own, is counted by its timesteps.

    Args:
        pipeline: the pipeline that runs the transformer; only a weak reference is kept.
        steps: the number of steps, where the user states it.

    Raises:
        ValueError: `steps` is not an integer of at least 1.
    """

    def __init__(self, pipeline: object | None = None, steps: int | None = None) -> None:
        if steps is not None and (type(steps) is not int or steps < 1):
            raise ValueError(f"Expected steps to be an integer of at least 1, got {steps!r}.")
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._steps = steps
        self._generation = 0
        self._step = 0
        self._timesteps: Any = None
        self._finished = False
        self._last: float | None = None

    def read(self, timestep: Tensor | float | None) -> Moment:
        """The moment of a forward that was given this `timestep`."""
        scheduler = getattr(self._pipeline and self._pipeline(), "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        total = None if timesteps is None else len(timesteps)
        index = getattr(scheduler, "step_index", None)
        finished = index is not None and total is not None and index >= total
        # set_timesteps() makes a new tensor.
        begins = timesteps is not self._timesteps or finished is not self._finished
        if begins:
            self._timesteps, self._finished, self._last = timesteps, finished, None
        if index is not None and not finished:
            self._advance(index, begins or index < self._step)
            return self._moment(total)
        # Before the first scheduler.step() there is no index; image-to-image starts late.
        start = 0 if finished else getattr(scheduler, "begin_index", None) or 0
        counts = hasattr(scheduler, "step_index")
        if timestep is not None:
            value = float(timestep.max()) if isinstance(timestep, Tensor) else timestep
            self._read_value(value, start)
        elif counts and not finished:
            self._advance(start, begins)
        else:
            return Moment(None, self._steps, self._generation)
        # A scheduler that stands still while the timestep moves does not drive these forwards.
        drives = not counts or (self._step == start and not finished)
        return self._moment(total if drives else None)

    def _moment(self, total: int | None) -> Moment:
        steps = total if self._steps is None else self._steps
        return Moment(self._step, steps, self._generation)

    def _read_value(self, value: float, start: int) -> None:
        begins = self._last is None or value > self._last
        same = value == self._last
        self._last = value
        self._advance(start if begins else self._step + (not same), begins)

    def _advance(self, step: int, begins: bool) -> None:
        self._step = step
        self._generation += begins

    def __deepcopy__(self, memo: dict[int, Any]) -> StepClock:
        # A weak reference would keep pointing at the original pipeline; when the pipeline itself
        # is being copied its copy is already in the memo.
        pipeline = self._pipeline and self._pipeline()
        return StepClock(memo.get(id(pipeline)), self._steps)

    def __getstate__(self) -> dict[str, Any]:
        return {"_steps": self._steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(None, state["_steps"])  # type: ignore[misc]
