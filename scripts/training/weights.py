"""Weights of a module by name, in and out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, shared ones once."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


@torch.no_grad()
def load_weights(module: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Copies stored weights into a module.

    Raises:
        ValueError: names or shapes are not those of the module.
    """
    wanted = dict(module.named_parameters())
    wrong = wanted.keys() ^ stored.keys()
    wrong |= {n for n in wanted.keys() & stored.keys() if wanted[n].shape != stored[n].shape}
    if wrong:
        raise ValueError(
            f"Expected the weights of this recipe, got others ({len(wrong)} differ, such as "
            f"{min(wrong)!r}). Use the scripts that wrote the checkpoint, or start a new folder."
        )
    for name, parameter in wanted.items():
        parameter.copy_(stored[name])
