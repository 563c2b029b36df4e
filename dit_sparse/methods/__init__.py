"""Every sparse attention method by name: one frozen dataclass per file of this folder."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from dit_sparse.method import SparseMethod

MethodSpec = SparseMethod | str | Mapping[int | str, "SparseMethod | str"]


@dataclass(frozen=True)
class Option:
    """One option of a method, for help texts and for reading values from a command line."""

    name: str
    type: Any
    default: Any
    help: str


@cache
def _classes() -> Mapping[str, type]:
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            named = isinstance(value, type) and value.__module__ == module.__name__
            if named and isinstance(getattr(value, "name", None), str):
                found[value.name] = value
    return found


def names() -> list[str]:
    """The methods that `create` knows: those that need nothing but options to be made."""
    return sorted(name for name in _classes() if all(o.type is str for o in _required(name)))


def check_name(name: str) -> None:
    """Refuses what is no name of a method.

    Raises:
        ValueError: with the nearest name.
    """
    if name not in names():
        raise ValueError(
            f"Expected a method among {', '.join(names())}, got {name!r}.{_near(name, names())}"
        )


def create(name: str, options: Mapping[str, Any] | None = None) -> SparseMethod:
    """The method of this name with these options.

    Raises:
        ValueError: unknown name or option (the sentence suggests the nearest), or a bad value.
    """
    check_name(name)
    known = [option.name for option in describe(name)]
    for option in options or {}:
        if option not in known:
            raise ValueError(
                f"Expected an option of {name!r} among {', '.join(known) or 'none'}, "
                f"got {option!r}.{_near(option, known)}"
            )
    for missing in _required(name):
        if missing.name not in (options or {}):
            raise ValueError(
                f"Expected the option {missing.name!r} of {name!r}, got none: {missing.help}"
            )
    return _classes()[name](**(options or {}))


def describe(name: str) -> list[Option]:
    """The options of a method: its dataclass fields; help comes from the class's Args section."""
    cls = _classes()[name]
    hints = typing.get_type_hints(cls)
    texts = _argument_help(cls.__doc__ or "")
    return [
        Option(f.name, hints[f.name], f.default, texts.get(f.name, ""))
        for f in dataclasses.fields(cls)
    ]


def _required(name: str) -> list[Option]:
    return [option for option in describe(name) if option.default is dataclasses.MISSING]


def parse(spec: MethodSpec, options: Mapping[str, Any] | None = None) -> SparseMethod:
    """A method from what a user may write.

    Args:
        spec: a method; a name; or a mapping from layer numbers, with `"default"` for all others
            (dense if absent), to methods or names.
        options: for a name: its options.

    Raises:
        ValueError: unknown names, options given beside a finished method, a bad layer key.
    """
    if isinstance(spec, str):
        return create(spec, options)
    if options:
        raise ValueError(
            f"Expected options only beside a method's name, got {dict(options)} beside {spec!r}. "
            "Put them into the method itself."
        )
    if isinstance(spec, Mapping):
        return _per_layer(spec)
    if isinstance(spec, SparseMethod):
        return spec
    raise ValueError(
        f"Expected a method, its name or a mapping of layers to methods, got {type(spec).__name__}."
    )


def _per_layer(spec: Mapping[int | str, SparseMethod | str]) -> SparseMethod:
    from dit_sparse.methods.schedule import Schedule

    for key in spec:
        if key != "default" and not isinstance(key, int):
            raise ValueError(f'Expected layer numbers or "default" as keys, got {key!r}.')
    layers = tuple((k, parse(m)) for k, m in spec.items() if isinstance(k, int))
    return Schedule(parse(spec.get("default", "dense")), layers=layers)


def _near(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _argument_help(doc: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    name, inside = None, False
    for line in doc.splitlines():
        stripped = line.strip()
        if stripped == "Args:":
            inside = True
        elif inside and line.startswith(" " * 8) and not line.startswith(" " * 9) and ":" in line:
            name, _, text = stripped.partition(":")
            texts[name] = text.strip()
        elif inside and name and line.startswith(" " * 12):
            texts[name] += " " + stripped
        elif inside and stripped:
            inside = False
    return texts
