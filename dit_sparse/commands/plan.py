"""`dit-sparse plan`: what a window costs on a grid, and the tile and stride to run it with."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dit_sparse.commands.words import at_least
from dit_sparse.grid import TokenGrid
from dit_sparse.methods.window import WindowMethod
from dit_sparse.neighbourhood import Borders
from dit_sparse.per_axis import Extents
from dit_sparse.simulator import Candidate, Simulator

Axes = tuple[int | float, ...]


@dataclass(frozen=True)
class Request:
    """What is asked for; windows, strides and tiles are those of `WindowMethod`."""

    grid: str
    window: int | Axes | Literal["auto"] | None = None
    density: float | None = None
    stride: int | tuple[int, ...] | None = None
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    borders: Borders = "inward"
    tile: tuple[int, ...] | None = None
    block: int = 128
    text: int = 0
    top: int = 10


@dataclass(frozen=True)
class Report:
    """The candidates for a window, the fastest first.

    Args:
        simulator: of the grid and the window.
        candidates: all that were tried.
        top: how many the table lists.
    """

    simulator: Simulator
    candidates: Sequence[Candidate]
    top: int = 10

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    @property
    def listed(self) -> list[Candidate]:
        """The first candidates, and the first whose queries have windows of their own."""
        exact = (c for c in self.candidates[self.top :] if c.stride == (1, 1, 1))
        shown = list(self.candidates[: self.top])
        if not any(c.stride == (1, 1, 1) for c in shown):
            shown += [c for c, _ in zip(exact, range(1), strict=False)]
        return shown

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        simulator = self.simulator
        return {
            "grid": list(simulator.grid.shape),
            "window": list(simulator.window),
            "dilation": list(simulator.dilation),
            "causal": list(simulator.causal),
            "borders": simulator.borders,
            "block": simulator.block,
            "text": simulator.text,
            "limit": simulator.limit,
            "tried": len(self.candidates),
            "best": self.best.to_dict(),
            "candidates": [candidate.to_dict() for candidate in self.listed],
        }

    def __str__(self) -> str:
        simulator, best = self.simulator, self.best
        text = f" and {simulator.text} text tokens" if simulator.text else ""
        cells = [_HEADER, *map(_cells, self.listed)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            [
                f"grid {simulator.grid}{text}, window {_x(simulator.window)}"
                f"{self._rules(', ', ' ')}, blocks of {simulator.block}; the window alone: "
                f"{simulator.limit:.2f}x over dense attention",
                *("  ".join(map(str.rjust, row, widths)) for row in cells),
                f"best of {len(self.candidates)}: --method window --option "
                f"window={_x(simulator.window)} --option stride={_x(best.stride)} --option "
                f"tile={_x(best.tile)} --option block={simulator.block}"
                f"{self._rules(' --option ', '=')}",
            ]
        )

    def _rules(self, before: str, between: str) -> str:
        """What else a window is than moved inwards at the borders."""
        s, found = self.simulator, []
        if max(s.dilation) > 1:
            found.append(("dilation", _x(s.dilation)))
        if any(s.causal):
            found.append(("causal", "x".join(str(flag).lower() for flag in s.causal)))
        if s.borders != "inward":
            found.append(("borders", s.borders))
        return "".join(f"{before}{name}{between}{text}" for name, text in found)


_HEADER = ("tile", "stride", "density", "entries", "full", "bound", "worst", "estimate")


def _cells(c: Candidate) -> tuple[str, ...]:
    return (
        _x(c.tile),
        _x(c.stride),
        f"{c.density:.4f}",
        str(c.visited),
        f"{c.full / c.visited:.0%}",
        f"{c.bound:.2f}x",
        f"{c.worst_bound:.2f}x",
        f"{c.speedup:.2f}x",
    )


def _x(extents: Extents) -> str:
    return "x".join(map(str, extents))


def plan(request: Request) -> Report:
    """Tries tiles and strides.

    Raises:
        ValueError: what `TokenGrid.parse` and `WindowMethod` refuse, or negative numbers.
    """
    at_least(request.text, 0, "--text")
    at_least(request.top, 1, "--top")
    grid = TokenGrid.parse(request.grid)
    method = WindowMethod(
        window=request.window,
        density=request.density,
        stride=request.stride,
        dilation=request.dilation,
        causal=request.causal,
        borders=request.borders,
        tile=request.tile,
        block=request.block,
    )
    shape = method.shape_on(grid)
    frames, height, width = method.axes_on(grid, shape.window, shape.stride)
    simulator = Simulator(
        grid,
        shape.window,
        request.block,
        request.text,
        dilation=(frames.dilation, height.dilation, width.dilation),
        causal=(frames.causal, height.causal, width.causal),
        borders=request.borders,
    )
    found = simulator.candidates(
        strides=None if request.stride is None else [shape.stride],
        tiles=None if request.tile is None else [shape.tile],
    )
    return Report(simulator, found, request.top)


def plot(report: Report, path: Path) -> None:
    """Draws the candidates that are not far behind the best: what the visited blocks alone allow
    against what is estimated, which is less by what short and masked blocks cost.

    Raises:
        ValueError: matplotlib is missing, or it cannot write such a file.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ValueError(
            f"Expected matplotlib for --plot, got none ({error}). Install matplotlib."
        ) from error
    figure = figures.Figure(figsize=(6, 6), layout="constrained")
    _draw(figure.add_subplot(), report)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Expected a picture file for --plot, got {str(path)!r}: {error}."
        ) from error


def _draw(axes: Any, report: Report) -> None:
    best, limit = report.best, report.simulator.limit
    near = [c for c in report.candidates if 30 * c.speedup >= best.speedup]
    for exact, name in ((False, "queries share windows"), (True, "stride 1")):
        shown = [c for c in near if (c.stride == (1, 1, 1)) is exact]
        bounds, estimates = [c.bound for c in shown], [c.speedup for c in shown]
        axes.scatter(bounds, estimates, s=8, alpha=0.5, linewidths=0, label=name)
    axes.scatter([best.bound], [best.speedup], s=60, facecolors="none", edgecolors="black")
    axes.annotate(
        f"tile {_x(best.tile)}, stride {_x(best.stride)}",
        (best.bound, best.speedup),
        xytext=(-10, 8),
        textcoords="offset points",
        ha="right",
    )
    low = min(c.speedup for c in near)
    axes.plot([low, limit], [low, limit], color="gray", lw=0.8, label="all blocks full")
    axes.axvline(limit, color="black", lw=0.8, ls=":", label="the window alone")
    axes.set(
        title=f"grid {report.simulator.grid}, window {_x(report.simulator.window)}",
        xlabel="speedup if a visited block took as long as a dense one",
        ylabel="estimated speedup over dense attention",
        xscale="log",
        yscale="log",
    )
    axes.legend(fontsize="small")
