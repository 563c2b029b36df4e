"""With which options, dense steps and dense layers a method runs on a family, when it is named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from dit_sparse.method import SparseMethod
from dit_sparse.methods import MethodSpec, create, parse
from dit_sparse.methods.schedule import Schedule


@dataclass(frozen=True)
class Default:
    """What `defaults.json` says of a method on a family.

    Args:
        options: of the method.
        dense_first, dense_layers: of the schedule around it.
        source: where the numbers come from.
    """

    options: Mapping[str, Any]
    dense_first: int | float
    dense_layers: tuple[int, ...]
    source: str


@cache
def defaults() -> Mapping[str, Mapping[str, Default]]:
    """Every default by method and family."""
    text = resources.files("dit_sparse.pipelines").joinpath("defaults.json").read_text("utf-8")
    return {
        method: {family: _default(entry) for family, entry in families.items()}
        for method, families in json.loads(text).items()
    }


def default_for(family: str, name: str, layers: int) -> Default | None:
    """What `defaults.json` says of a method on a family; `None` if nothing.

    Args:
        layers: attention layers of the transformer; at most the first half of them are dense.
    """
    default = defaults().get(name, {}).get(family)
    if default is None:
        return None
    # A model of few layers must keep sparse ones.
    dense = tuple(layer for layer in default.dense_layers if layer < layers // 2)
    return replace(default, dense_layers=dense)


def method_for(
    family: str,
    spec: MethodSpec,
    options: Mapping[str, Any] | None = None,
    *,
    layers: int,
    timed: bool = True,
) -> SparseMethod:
    """`parse`, with the family's defaults for a method given by name.

    Options that are given replace those of the family as a whole; its dense steps and layers stay.
    A method that is an object, or in a mapping of layers, is taken as it is.

    Args:
        layers: attention layers of the transformer; at most the first half of them are dense.
        timed: whether it will be known how many steps a generation takes: without, no step is kept
            dense.

    Raises:
        ValueError: see `parse`.
    """
    default = default_for(family, spec, layers) if isinstance(spec, str) else None
    if default is None or not isinstance(spec, str):
        return parse(spec, options)
    method = create(spec, options or default.options)
    first = default.dense_first if timed else 0
    schedule = Schedule(method, dense_first=first, dense_layers=default.dense_layers)
    return method if schedule == Schedule(method) else schedule


def _default(entry: Mapping[str, Any]) -> Default:
    options = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in entry["options"].items()
    }
    layers = tuple(entry["dense_layers"])
    return Default(options, entry["dense_first"], layers, entry["source"])
