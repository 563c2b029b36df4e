"""What the toolkit must know of a model family, as data. One file beside this one per family."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from dit_sparse.grid import TokenLayout


@dataclass(frozen=True)
class Family:
    """Facts about the transformers of one model family.

    Args:
        name: as the CLI prints it, e.g. `"wan"`.
        transformers: names of the diffusers transformer classes.
        attention: regular expression that matches, in full, the module names of the
            self-attention (or joint attention) that may become sparse. Everything else
            (cross-attention, refiners) keeps its stock processor.
        processors: names of the stock processor classes found on those modules.
        layout: reads the token layout of a forward from the transformer and its bound arguments
            (by parameter name, defaults filled in). Must not synchronise with the device except
            through `text_lengths`, which remembers what it read.
        pipelines: names of the diffusers pipeline classes this was tested with.
        model: a published model id for examples.
        makes_masks: whether the transformer itself makes the masks of this attention, from the
            lengths that `layout` reads, so that they say nothing else in any forward.
        side: what the pipelines want height and width in pixels to be a multiple of, whatever
            their VAE and patches are.
    """

    name: str
    transformers: tuple[str, ...]
    attention: str
    processors: tuple[str, ...]
    layout: Callable[[nn.Module, Mapping[str, Any]], TokenLayout]
    pipelines: tuple[str, ...]
    model: str
    makes_masks: bool = False
    side: int = 1

    def attends(self, module_name: str) -> bool:
        """Whether the module of this name is the family's self-attention."""
        return re.fullmatch(self.attention, module_name) is not None


@cache
def families() -> Mapping[str, Family]:
    """Every family by name: the `FAMILY` of each module in this folder that has one."""
    package = "dit_sparse.pipelines"
    found = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        family = getattr(importlib.import_module(f"{package}.{info.name}"), "FAMILY", None)
        if family is not None:
            found[family.name] = family
    return found


def family_of(transformer: nn.Module) -> Family:
    """The family of a transformer.

    Raises:
        ValueError: no family knows the transformer's class.
    """
    names = {c.__name__ for c in type(transformer).__mro__}
    for family in families().values():
        if names & set(family.transformers):
            return family
    known = sorted(t for f in families().values() for t in f.transformers)
    raise ValueError(
        f"Expected a transformer of a supported family, got {type(transformer).__name__}. "
        f"Supported: {', '.join(known)}. A new family is one file in pipelines/."
    )
