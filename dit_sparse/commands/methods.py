"""Builds a method from command-line words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_sparse import methods
from dit_sparse.commands.words import layers_of, steps_of, value_of
from dit_sparse.method import SparseMethod
from dit_sparse.methods.saved import SavedPlan
from dit_sparse.methods.schedule import Schedule
from dit_sparse.plan import BlockPlan
from dit_sparse.plan_io import load_plan


def method_of(
    name: str,
    options: Sequence[str] = (),
    *,
    density: float | None = None,
    plan: Path | None = None,
    dense_first: str = "0",
    dense_last: str = "0",
    dense_layers: str | None = None,
    min_tokens: int = 0,
) -> SparseMethod:
    """A method by name, inside a schedule when part of the generation stays dense.

    Args:
        name: one of `dit_sparse.methods.names()`.
        options: `key=value` texts, read by the types that the method declares.
        density: short for the option of this name.
        plan: a file that `save_plan` wrote, in place of a method.
        dense_first, dense_last: a count of steps or a fraction of them.
        dense_layers: layer numbers such as `0,1,30-39`.
        min_tokens: dense below this sequence length.

    Raises:
        ValueError: an unknown name or option, a bad value, or a file that is no plan.
    """
    if plan is None:
        method = _by_name(name, options, density)
    elif options or density is not None:
        raise ValueError(
            f"Expected --plan or a method's options, got both ({plan}). Drop one: a plan is final."
        )
    else:
        method = SavedPlan(_read(plan))
    schedule = Schedule(
        method,
        dense_first=steps_of(dense_first, "--dense-first"),
        dense_last=steps_of(dense_last, "--dense-last"),
        dense_layers=() if dense_layers is None else layers_of(dense_layers),
        min_tokens=min_tokens,
    )
    return method if schedule == Schedule(method) else schedule


def _read(path: Path) -> BlockPlan:
    try:
        return load_plan(path)
    except OSError as error:
        raise ValueError(f"{error.strerror}, not {str(path)!r}.") from error


def _by_name(name: str, options: Sequence[str], density: float | None) -> SparseMethod:
    chosen = _options(name, options)
    if density is not None:
        if "density" not in {option.name for option in _describe(name)}:
            raise ValueError(
                f"Expected a method with a density for --density, got {name!r}. Leave it out."
            )
        if "density" in chosen:
            raise ValueError("Expected one density, got --density and --option density=. Drop one.")
        chosen["density"] = density
    return methods.create(name, chosen)


def _options(name: str, texts: Sequence[str]) -> dict[str, Any]:
    types = {option.name: option.type for option in _describe(name)}
    chosen: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise ValueError(f"Expected --option key=value, got {text!r}.")
        if key in chosen:
            raise ValueError(f"Expected each --option once, got {key!r} twice.")
        # `create` refuses unknown names, and knows the nearest.
        chosen[key] = value_of(value.strip(), types[key], key) if key in types else value
    return chosen


def _describe(name: str) -> list[methods.Option]:
    if name not in methods.names():
        methods.create(name)  # raises the sentence with the nearest name
    return methods.describe(name)
