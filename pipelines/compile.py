"""Compiles the blocks of a transformer, one graph for all that are alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dit_sparse.pipelines.family import family_of
from dit_sparse.pipelines.install import attention_modules


def compile_blocks(
    transformer: nn.Module, backend: str | Callable[..., Any] = "inductor"
) -> nn.Module:
    """Compiles in place what diffusers' `compile_repeated_blocks` does; returns the transformer.

    Classes that do not say which blocks they repeat (CogVideoX, Stable Diffusion 3, PixArt, DiT)
    have those compiled that hold the family's self-attention.

    Args:
        transformer: of a supported family.
        backend: of `torch.compile`.

    Raises:
        ValueError: no family knows the transformer's class.
    """
    if getattr(transformer, "_repeated_blocks", None):
        transformer.compile_repeated_blocks(fullgraph=True, backend=backend)  # type: ignore[operator]
        return transformer
    names = attention_modules(transformer, family_of(transformer))
    for block in dict.fromkeys(name.rpartition(".")[0] for name in names):
        transformer.get_submodule(block).compile(fullgraph=True, backend=backend)
    return transformer
