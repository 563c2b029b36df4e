"""When a run ends, and how its learning rate goes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

#: Share of the learning rate that the cool-down ends with.
FLOOR = 0.02


@dataclass(frozen=True)
class Clock:
    """The box of a run, in minutes, in steps, or whichever ends first.

    Args:
        minutes: since `started`.
        steps: of this run; `None` leaves only the minutes.
        warmup: steps of this run in which the learning rate rises from 0.
        cooldown: last share of the box in which it falls, 0 for none.
        started: on the monotonic clock, in seconds.
    """

    minutes: float
    steps: int | None = None
    warmup: int = 0
    cooldown: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if not self.minutes > 0 or (self.steps is not None and self.steps < 1):
            raise ValueError(
                f"Expected more than 0 minutes and at least 1 step, got {self.minutes} and "
                f"{self.steps}."
            )
        if self.warmup < 0 or not 0 <= self.cooldown <= 1:
            raise ValueError(
                f"Expected a warm-up of 0 or more steps and a cool-down from 0 to 1, got "
                f"{self.warmup} and {self.cooldown}."
            )

    def elapsed(self) -> float:
        """Minutes since the start."""
        return (time.monotonic() - self.started) / 60

    def progress(self, step: int, minutes: float | None = None) -> float:
        """Share of the box that is used up before step `step` of this run.

        Args:
            step: of this run.
            minutes: since the start; `None` for those up to now.
        """
        spent = (self.elapsed() if minutes is None else minutes) / self.minutes
        return spent if self.steps is None else max(spent, step / self.steps)

    def rate(self, step: int, minutes: float | None = None) -> float:
        """Factor of the learning rate; arguments as of `progress`."""
        rise = min(1.0, (step + 1) / (self.warmup + 1))
        left = 1 - self.progress(step, minutes)
        if left >= self.cooldown or not self.cooldown:
            return rise
        return rise * max(FLOOR, left / self.cooldown)
