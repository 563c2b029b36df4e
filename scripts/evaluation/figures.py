"""Pictures and tables of attention maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from scripts.evaluation.compare import Point
from scripts.evaluation.maps import HeadMap
from scripts.evaluation.structure import HOLDS, KINDS

LAYERS_SHOWN = 4
_GAMMA = 0.35  # of the colour scale: a few large entries would leave the rest black
_TITLE = 0.35  # inches above a map
_BRIGHTEST = 0.999  # quantile of a map that gets the brightest colour
_COLUMNS = ("entropy", "best 10 %", "best 20 %", "window", "frame", "place", "text")


def draw_grid(maps: Sequence[HeadMap], path: Path, title: str, *, zoom: bool) -> None:
    """Heads as rows, (layer, step) as columns; at most four layers, evenly spread.

    Args:
        maps: all of them.
        path: picture to write.
        title: above all.
        zoom: whether to show the middle of the picture instead of the whole sequence.
    """
    layers = _spread(sorted({m.layer for m in maps}), LAYERS_SHOWN)
    columns = [(la, st) for la in layers for st in sorted({m.step for m in maps})]
    shown = {(m.head, m.layer, m.step): m for m in maps}
    heads = sorted({m.head for m in maps})
    figure, axes = _figure(len(heads), len(columns), 1.55, title)
    for row, head in enumerate(heads):
        for column, (layer, step) in enumerate(columns):
            found = shown.get((head, layer, step))
            if found is not None:
                name = f"layer {layer} head {head} step {step}"
                _show(
                    axes[row, column],
                    found.zoom if zoom else found.picture,
                    f"{name}\n{found.kind}",
                )
    _save(figure, path)


def draw_examples(maps: Sequence[HeadMap], path: Path) -> None:
    """For each kind that occurs its clearest head: the whole map and the middle of it."""
    found = examples(maps)
    figure, axes = _figure(2, len(found), 3.4, "")
    for column, example in enumerate(found):
        where = f"layer {example.layer}, head {example.head}, step {example.step}"
        kept = f"best 10 % of keys keep {example.numbers['best 10 %']:.0%}"
        _show(axes[0, column], example.picture, f"{example.kind}: {where}\n{kept}")
        _show(axes[1, column], example.zoom, "the middle of it")
    _save(figure, path)


def examples(maps: Sequence[HeadMap]) -> list[HeadMap]:
    """The head of each kind that is most of it: by its shape's mass, or for global by entropy."""
    return [
        max(alike, key=lambda m: m.numbers[HOLDS.get(m.kind, "entropy")])
        for kind in KINDS
        if (alike := [m for m in maps if m.kind == kind])
    ]


def draw_curves(points: Sequence[Point], path: Path, title: str) -> None:
    """Median error over the time of every method, a panel for each kind of heads."""
    from matplotlib.ticker import FixedLocator, NullFormatter

    found: dict[str, dict[str, dict[float, list[Point]]]] = {}
    for point in points:
        for kind in ("all", point.kind):
            curve = found.setdefault(kind, {}).setdefault(point.name, {})
            curve.setdefault(point.density, []).append(point)
    figure, axes = _figure(1, len(found), 3.4, title)
    for panel, (kind, curves) in zip(axes.flat, sorted(found.items()), strict=True):
        panel.set_axis_on()
        for name, by_density in curves.items():
            places = [
                (median(p.time for p in group), median(p.error for p in group))
                for group in by_density.values()
            ]
            panel.plot(*zip(*sorted(places), strict=True), marker="o", ms=3, lw=0.8, label=name)
        heads = {(p.layer, p.head, p.step) for c in curves.values() for g in c.values() for p in g}
        panel.set(xscale="log", yscale="log", xlabel="time / time of dense attention")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.xaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2, 5]))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_title(f"{kind} ({len(heads)} heads)", fontsize=8)
    axes[0, 0].set_ylabel("relative error, median")
    axes[0, 0].legend(fontsize=6)
    _save(figure, path)


def table(maps: Sequence[HeadMap]) -> str:
    """Markdown: one row for each head, its kind at each step and its numbers' means over steps."""
    names = [name for name in _COLUMNS if name in maps[0].numbers]
    steps = sorted({m.step for m in maps})
    head = [
        "| layer | head | "
        + " | ".join(f"step {step}" for step in steps)
        + f" | {' | '.join(names)} |",
        "|" + "---|" * (2 + len(steps) + len(names)),
    ]
    rows: dict[tuple[int, int], list[HeadMap]] = {}
    for found in maps:
        rows.setdefault((found.layer, found.head), []).append(found)
    return "\n".join(head + [_row(found, steps, names) for found in rows.values()])


def counts(maps: Sequence[HeadMap]) -> str:
    """How many maps are of each kind, in a sentence's part."""
    kinds = Counter(m.kind for m in maps)
    return ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS if kinds[kind])


def _row(found: Sequence[HeadMap], steps: Sequence[int], names: Sequence[str]) -> str:
    kinds = {m.step: m.kind for m in found}
    means = [sum(m.numbers[name] for m in found) / len(found) for name in names]
    cells = [found[0].layer, found[0].head, *(kinds.get(step, "") for step in steps)]
    return f"| {' | '.join(map(str, cells))} | {' | '.join(f'{mean:.2f}' for mean in means)} |"


def _figure(rows: int, columns: int, side: float, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(side * columns, (side + _TITLE) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.set_axis_off()
    figure.suptitle(title, fontsize=9)
    return figure, axes


def _show(axes: Any, picture: Tensor, title: str) -> None:
    from matplotlib.colors import PowerNorm

    values = picture.float()
    top = float(values.quantile(_BRIGHTEST)) or float(values.max())
    axes.imshow(values.numpy(), cmap="magma", norm=PowerNorm(_GAMMA, 0, top, clip=True))
    axes.set_title(title, fontsize=6 if axes.figure.get_figwidth() > 12 else 8)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, pil_kwargs={"quality": 85} if path.suffix == ".webp" else {})


def _spread(values: Sequence[int], count: int) -> list[int]:
    picks = torch.linspace(0, len(values) - 1, min(count, len(values))).round().long()
    return [values[i] for i in picks.tolist()]
