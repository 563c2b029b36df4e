"""Builds a method from command-line words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dit_sparse import methods
from dit_sparse.commands.models import Model
from dit_sparse.commands.words import layers_of, steps_of, value_of
from dit_sparse.method import SparseMethod
from dit_sparse.methods.saved import SavedPlan
from dit_sparse.methods.schedule import Schedule
from dit_sparse.pipelines.apply import transformers_of
from dit_sparse.pipelines.defaults import default_for
from dit_sparse.pipelines.family import family_of
from dit_sparse.pipelines.install import attention_modules
from dit_sparse.plan import BlockPlan
from dit_sparse.plan_io import load_plan

#: What stays dense, beside the options of a method, and the words for nothing.
NOTHING = {"dense_first": "0", "dense_last": "0", "dense_layers": "none", "min_tokens": "0"}


@dataclass(frozen=True)
class Wording:
    """A method in words. What they leave open is up to the family of the model.

    Args:
        name: one of `dit_sparse.methods.names()`.
        options: `key=value` texts, read by the types that the method declares.
        density: short for the option of this name.
        plan: a file that `save_plan` wrote, in place of a method.
        schedule: texts by the names of `NOTHING`: a count of steps or a fraction of them, layer
            numbers such as `0,1,30-39`, and the length below which a sequence is dense.
    """

    name: str
    options: tuple[str, ...] = ()
    density: float | None = None
    plan: Path | None = None
    schedule: Mapping[str, str] = field(default_factory=dict)

    def method(self) -> SparseMethod:
        """The method, inside a schedule when part of the generation stays dense.

        Raises:
            ValueError: an unknown name or option, a bad value, or a file that is no plan.
        """
        if self.plan is None:
            method = _by_name(self.name, self.options, self.density)
        elif self.options or self.density is not None:
            raise ValueError(
                f"Expected --plan or a method's options, got both ({self.plan}). Drop one: a plan "
                "is final."
            )
        else:
            method = SavedPlan(_read(self.plan))
        words = {**NOTHING, **self.schedule}
        if not re.fullmatch(r"-?\d+", words["min_tokens"]):
            raise ValueError(
                f"Expected min_tokens as a number of tokens, got {words['min_tokens']!r}."
            )
        layers = words["dense_layers"]
        schedule = Schedule(
            method,
            dense_first=steps_of(words["dense_first"], "--dense-first"),
            dense_last=steps_of(words["dense_last"], "--dense-last"),
            dense_layers=() if layers == NOTHING["dense_layers"] else layers_of(layers),
            min_tokens=int(words["min_tokens"]),
        )
        return method if schedule == Schedule(method) else schedule

    def on(self, family: str, layers: int) -> Wording:
        """With what `pipelines/defaults.json` says, as for a name that is given to `apply`.

        Options replace those of the family as a whole, dense steps and layers each their own.

        Args:
            layers: attention layers of the transformer.
        """
        default = None if self.plan is not None else default_for(family, self.name, layers)
        if default is None:
            return self
        options = tuple(f"{key}={_text(value)}" for key, value in default.options.items())
        if self.options or self.density is not None:
            options = self.options
        schedule = {"dense_first": str(default.dense_first)}
        if default.dense_layers:
            schedule["dense_layers"] = ",".join(map(str, default.dense_layers))
        return replace(self, options=options, schedule={**schedule, **self.schedule})


def wording_on(wording: Wording, model: Model) -> Wording:
    """`Wording.on` for the transformers of a model.

    Raises:
        ValueError: it has none of a supported family.
    """
    found = list(transformers_of(model.pipeline).values())
    family = family_of(found[0])
    layers = min(len(attention_modules(transformer, family)) for transformer in found)
    return wording.on(family.name, layers)


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


def _text(value: Any) -> str:
    """A value of an option as `value_of` reads it."""
    if isinstance(value, tuple):
        heads = any(isinstance(part, tuple) for part in value)
        if heads:
            return "+".join("x".join(map(_text, part)) for part in value)
        return ",".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _describe(name: str) -> list[methods.Option]:
    methods.check_name(name)
    return methods.describe(name)
