"""Ways to run attention, as words: `window:density=0.2|0.3, pisa:density=0.2:dense_first=0.2`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, cast, get_args

from dit_sparse.backend import Precision
from dit_sparse.commands.methods import NOTHING, Wording, wording_on
from dit_sparse.commands.models import Model
from dit_sparse.commands.words import among
from dit_sparse.method import SparseMethod
from dit_sparse.methods import create

#: What stays dense, beside the options of a method.
SCHEDULE = tuple(NOTHING)

#: Dense baselines: the model's own processors, with diffusers' default backend or another.
STOCK = "stock"
KERNELS = {"cudnn": "_native_cudnn", "flash": "_native_flash"}
BASELINES = (STOCK, "dense", *KERNELS)


@dataclass(frozen=True)
class Variant:
    """A way to run attention.

    Args:
        label: its name in every table; no two are alike. Of paths it has the last part.
        method: of the self-attention; `None` keeps the stock processors.
        kernel: for stock processors, an attention backend of diffusers; `None` is its default.
        precision: what sparse calls multiply in; see `dit_sparse.apply`.
        words: the options of `dit-sparse sample` that run the same.
        wording: what a method was given as, which the family of a model completes.
    """

    label: str
    method: SparseMethod | None = None
    kernel: str | None = None
    precision: Precision = "bf16"
    words: tuple[str, ...] = ()
    wording: Wording | None = None

    def on(self, model: Model) -> Variant:
        """With what the family of a model has by default, said in the label and the words too."""
        if self.wording is None:
            return self
        return _of_wording(wording_on(self.wording, model), self.precision)

    @property
    def is_baseline(self) -> bool:
        """Whether all of attention is computed."""
        return self.method is None or self.method.name == "dense"


@dataclass(frozen=True)
class Wish:
    """A method by name with one or more values for each option."""

    name: str
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def baselines_of(names: Sequence[str]) -> tuple[Variant, ...]:
    """The dense variants of these names; stock is always the first, since all are compared with it.

    Raises:
        ValueError: an unknown name.
    """
    found = [Variant(STOCK, words=("--method", "dense"))]
    for name in dict.fromkeys(names):
        if among(name, BASELINES, "a dense baseline") == "dense":
            found.append(Variant(name, create("dense"), words=("--method", "dense")))
        elif name in KERNELS:
            found.append(Variant(name, kernel=KERNELS[name]))
    return tuple(found)


def variants_of(
    entries: Sequence[Any], schedule: Mapping[str, str] | None = None
) -> tuple[Variant, ...]:
    """One variant for every combination of the values that the entries list.

    Args:
        entries: texts as in the docstring of this module, or mappings from a method's name to its
            options, where a list stands for several values.
        schedule: `dense_first` and the like, for all variants that do not say otherwise.

    Raises:
        ValueError: nothing, unknown names or bad values, or the same variant twice.
    """
    wishes = [wish for entry in entries for wish in _wishes(entry)]
    found = [variant for wish in wishes for variant in _combinations(wish, schedule or {})]
    if not found:
        raise ValueError(
            "Expected at least one method to evaluate, got none. Give --methods such as "
            "window:density=0.3,pisa:density=0.2."
        )
    twice = [label for label, count in Counter(v.label for v in found).items() if count > 1]
    if twice:
        raise ValueError(f"Expected each method once, got {twice[0]!r} twice. Drop one.")
    return tuple(found)


def _wishes(entry: Any) -> list[Wish]:
    if isinstance(entry, Mapping):
        return [Wish(str(name), _listed(name, options)) for name, options in entry.items()]
    if not isinstance(entry, str):
        raise ValueError(
            f"Expected a method as text or as a mapping to its options, got {entry!r}."
        )
    return [_read(text) for text in entry.split(",") if text.strip()]


def _read(text: str) -> Wish:
    name, *parts = (part.strip() for part in text.split(":"))
    options: dict[str, tuple[str, ...]] = {}
    for part in parts:
        key, equals, values = part.partition("=")
        if not equals or not key.strip() or not values.strip():
            raise ValueError(
                f"Expected a method as name:option=value, such as window:density=0.2|0.3, got "
                f"{text.strip()!r}."
            )
        options[_key(key)] = tuple(value.strip() for value in values.split("|"))
    return Wish(name, options)


def _listed(name: Any, options: Any) -> dict[str, tuple[str, ...]]:
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise ValueError(f"Expected the options of {name!r} as a mapping, got {options!r}.")
    return {
        _key(str(key)): tuple(map(_word, value if isinstance(value, list) else [value]))
        for key, value in options.items()
    }


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _key(text: str) -> str:
    return text.strip().replace("-", "_")


def _combinations(wish: Wish, schedule: Mapping[str, str]) -> list[Variant]:
    values = {**{key: (value,) for key, value in schedule.items()}, **wish.options}
    return [
        _variant(wish.name, dict(zip(values, chosen, strict=True)))
        for chosen in product(*values.values())
    ]


def _variant(name: str, chosen: Mapping[str, str]) -> Variant:
    apart = (*SCHEDULE, "precision")
    options = tuple(f"{key}={value}" for key, value in chosen.items() if key not in apart)
    precision = among(chosen.get("precision", "bf16"), get_args(Precision), "a precision")
    schedule = {key: value for key, value in chosen.items() if key in SCHEDULE}
    if "dense_layers" in schedule:  # commas stand between methods
        schedule["dense_layers"] = schedule["dense_layers"].replace("+", ",")
    wording = Wording(name, options, schedule=schedule)
    return _of_wording(wording, cast(Precision, precision))


def _shown(option: str) -> str:
    """An option as a label has it: of a path, which differs between machines, its last part."""
    key, equals, value = option.partition("=")
    return f"{key}{equals}{Path(value).name or value}" if "/" in value else option


def _of_wording(wording: Wording, precision: Precision) -> Variant:
    dense = {key: value for key, value in wording.schedule.items() if value != NOTHING[key]}
    words, shown = ["--method", wording.name], [wording.name, *map(_shown, wording.options)]
    for option in wording.options:
        words += ["--option", option]
    # Without a word for nothing, `sample` would take what the family has.
    for key, value in wording.schedule.items():
        words += [f"--{key.replace('_', '-')}", value]
    shown += [f"{key}={value.replace(',', '+')}" for key, value in dense.items()]
    if precision != "bf16":
        words += ["--precision", precision]
        shown.append(f"precision={precision}")
    return Variant(
        " ".join(shown),
        wording.method(),
        precision=precision,
        words=tuple(words),
        wording=wording,
    )
