"""Moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Average:
    """Keeps `model`, a copy whose parameters follow another's as a moving average.

    The rate starts high and falls to `1 - decay`, so that a fresh average forgets its start.

    Args:
        source: the model to follow; not yet compiled.
        decay: of the average, per update.
    """

    def __init__(self, source: nn.Module, decay: float = 0.999) -> None:
        self.model = copy.deepcopy(source).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        """Moves the average towards the present parameters of `source`."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(
            list(self.model.parameters()), list(source.parameters()), weight=1 - decay
        )
