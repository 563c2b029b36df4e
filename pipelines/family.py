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
class Tokens:
    """A place where tensors with one value per token pass.

    Args:
        name: of an argument of the transformer's forward, or of one of its modules, whose output
            is meant.
        axis: the token dimension, of the joint sequence or of the images alone. Tensors with fewer
            dimensions or one element there belong to no token in particular.
        items: which elements of a tuple; `None` for all.
        grid: whether the tokens stand along three dimensions (frames, height, width), of which
            `axis` is the first, as a convolution leaves them.
        optional: whether some transformers of the family do without this module.
    """

    name: str
    axis: int = 1
    items: tuple[int, ...] | None = None
    grid: bool = False
    optional: bool = False


def never(transformer: nn.Module, arguments: Mapping[str, Any]) -> str | None:
    """Nothing that a family's forward is given ties its tokens to their places."""
    return None


@dataclass(frozen=True)
class Hoist:
    """Where the tokens of a forward can be put into another order, and where back.

    Everything in between must treat each token alone but for attention.

    Args:
        arguments: those of the forward that have one value per token.
        outputs: modules that make tokens, or rotary embeddings for them.
        leaves: module whose output has the model's order again; what comes after it, an unpatchify
            say, wants that.
        refuses: says from the transformer and its bound arguments why this forward must keep the
            model's order, or `None`.
    """

    arguments: tuple[Tokens, ...] = ()
    outputs: tuple[Tokens, ...] = ()
    leaves: str = "proj_out"
    refuses: Callable[[nn.Module, Mapping[str, Any]], str | None] = never


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
        hoist: where tokens can be reordered once per forward; `None` if that is not known.
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
    hoist: Hoist | None = None

    def attends(self, module_name: str) -> bool:
        """Whether the module of this name is the family's self-attention."""
        return re.fullmatch(self.attention, module_name) is not None


def given(*names: str) -> Callable[[nn.Module, Mapping[str, Any]], str | None]:
    """Refuses forwards with any of these arguments, which are tied to the places of tokens."""

    def refuses(transformer: nn.Module, arguments: Mapping[str, Any]) -> str | None:
        found = next((name for name in names if arguments.get(name) is not None), None)
        return None if found is None else f"{found} are in the order of the model"

    return refuses


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
