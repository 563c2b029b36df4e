"""The history of the loss, as lines and as a picture."""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class History:
    """`history.jsonl` of a checkpoint folder: one line for every few steps of every stage."""

    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "history.jsonl"

    def append(self, line: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in line.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounded) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """All lines; a last line cut off by a kill is left out."""
        if not self.path.exists():
            return []
        whole = self.path.read_text(encoding="utf-8").rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def copy(self, target: History, parts: Container[str]) -> None:
        """Writes the lines of some parts as the whole of another history."""
        lines = [json.dumps(line) + "\n" for line in self.lines() if line["part"] in parts]
        target.path.unlink(missing_ok=True)
        if lines:
            target.path.write_text("".join(lines), encoding="utf-8")

    def plot(self, path: Path) -> None:
        """Draws the loss of every stage over its part's steps, as PNG."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib.figure import Figure

        lines = self.lines()
        parts = sorted({line["part"] for line in lines})
        if not parts:
            return
        figure = Figure(figsize=(6 * len(parts), 4), layout="constrained")
        for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
            stages = dict.fromkeys(line["stage"] for line in lines if line["part"] == part)
            for stage in stages:
                points = [p for p in lines if p["part"] == part and p["stage"] == stage]
                axes.plot([p["step"] for p in points], [p["loss"] for p in points], label=stage)
            axes.set(title=part, xlabel="step", ylabel="loss", yscale="log")
            axes.legend()
        figure.savefig(path, dpi=100)
