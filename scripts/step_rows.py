"""The rows of a benchmark of denoising steps, as JSON lines that several processes may add to."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: In the place of a variant: nothing of a case can be measured.
WHOLE = "the model"


@dataclass(frozen=True)
class Case:
    """A model by name, eager or with compiled blocks."""

    model: str
    compiled: bool


@dataclass(frozen=True)
class Rows:
    """The file of the rows.

    Args:
        path: made when the first row is added.
    """

    path: Path

    def all(self) -> list[dict[str, Any]]:
        """Every whole line; what a kill cut short is left out."""
        found = []
        if self.path.exists():
            for text in self.path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    found.append(json.loads(text))
        return found

    def missing(self, case: Case, variants: Sequence[str]) -> list[str]:
        """Of these variants, those without a row, not even one that says they failed."""
        known = {row["variant"] for row in self._of(case)}
        return [v for v in variants if v not in known and WHOLE not in known]

    def failed(self, case: Case) -> set[str]:
        """Variants whose row says that they failed."""
        return {row["variant"] for row in self._of(case) if "failed" in row}

    def append(self, case: Case, row: Mapping[str, Any]) -> None:
        """Adds a row in one write, on a line of its own."""
        whole = {"model": case.model, "compiled": case.compiled, **row}
        torn = self.path.exists() and not self.path.read_text(encoding="utf-8").endswith("\n")
        with self.path.open("a", encoding="utf-8") as lines:
            # A line that a kill cut short must not swallow this one.
            lines.write(("\n" if torn else "") + json.dumps(whole) + "\n")

    def drop(self, cases: Iterable[Case]) -> None:
        """Takes out the rows of these cases."""
        gone = set(cases)
        kept = [row for row in self.all() if Case(row["model"], row["compiled"]) not in gone]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        self.path.write_text(text, encoding="utf-8")

    def _of(self, case: Case) -> list[dict[str, Any]]:
        return [row for row in self.all() if Case(row["model"], row["compiled"]) == case]
