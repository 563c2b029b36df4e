"""The tables of `dit-sparse methods` and `dit-sparse families`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from typing import Any

from dit_sparse import methods
from dit_sparse.pipelines.family import families

Row = Mapping[str, Any]


def method_rows(names: Sequence[str] = ()) -> list[Row]:
    """Methods with their options, as plain values; all without names.

    Raises:
        ValueError: an unknown name.
    """
    for name in names:
        methods.check_name(name)
    return [
        {
            "name": name,
            "options": [
                {
                    "name": option.name,
                    "type": _type_name(option.type),
                    "default": None if option.default is MISSING else _plain(option.default),
                    "help": option.help,
                }
                for option in methods.describe(name)
            ],
        }
        for name in names or methods.names()
    ]


def method_text(rows: Sequence[Row]) -> str:
    """The methods for a terminal."""
    lines = []
    for row in rows:
        lines.append(row["name"])
        for option in row["options"]:
            lines.append(f"  {option['name']}={option['default']}  ({option['type']})")
            lines += textwrap.wrap(
                option["help"], 92, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
    return "\n".join(lines)


def family_rows() -> list[Row]:
    """Every model family, as plain values."""
    return [
        {
            "name": family.name,
            "transformers": list(family.transformers),
            "pipelines": list(family.pipelines),
            "model": family.model,
        }
        for _, family in sorted(families().items())
    ]


def family_text(rows: Sequence[Row]) -> str:
    """The families for a terminal."""
    return "\n".join(
        f"{row['name']:<14}{row['model']}\n"
        f"{'':<14}{', '.join(row['transformers'])}\n"
        f"{'':<14}{', '.join(row['pipelines'])}"
        for row in rows
    )


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
