"""What a training stage is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Goal(Enum):
    """What a stage learns; see `tasks`."""

    RECONSTRUCTION = "reconstruction"
    FLOW = "flow"
    DISTILLATION = "distillation"


@dataclass(frozen=True)
class Stage:
    """Defaults of a stage.

    Args:
        goal: what it learns.
        kinds: sets of sprites.
        sizes: see `buckets.parse_buckets`.
        lr: peak learning rate.
        cooldown: see `clock.Clock`.
        shown: frames, height and width of the samples.
    """

    goal: Goal
    kinds: tuple[str, ...]
    sizes: str
    lr: float
    cooldown: float
    shown: tuple[int, int, int]

    @property
    def part(self) -> str:
        """What it trains, as checkpoints call it."""
        return "vae" if self.goal is Goal.RECONSTRUCTION else "denoiser"
