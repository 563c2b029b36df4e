"""Noise levels to train at."""

from __future__ import annotations

import torch
from torch import Tensor


def time_shift(tokens: int) -> float:
    """How far noise levels of a clip are shifted towards noise; more tokens hide noise better."""
    return 1.5 * max(1.0, tokens / 256) ** (1 / 3)


def draw_times(batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Logit-normal noise levels `[B]` in 0..1, shifted (arXiv 2403.03206, eq. 19 and 23)."""
    shift = time_shift(tokens)
    times = torch.randn(batch, generator=generator, device=generator.device).sigmoid()
    return shift * times / (1 + (shift - 1) * times)
