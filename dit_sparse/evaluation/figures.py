"""Plots of an evaluation, as SVG text."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dit_sparse.evaluation.store import Line
from dit_sparse.evaluation.summary import Row, Summary

_MARKERS = "osD^vP*Xh<>"
_CEILING = 60.0  # dB: where identical clips are drawn
_LABELLED = 5
_WRITTEN = 200  # values of a table of colours that are written into it, at most
_LETTER = 0.055  # inches of a letter of 7 points, and a bit
_LINE = 0.15  # inches of a line of a legend
_AMOUNTS = ("density", "ends", "window", "mass", "path")
_GAMMA = 0.35  # of colours: a few large entries would leave the rest black
_DOTS, _QUALITY = 100, 70  # of block maps, which are too fine to be drawn as lines


def pareto(summary: Summary, metric: str, title: str, *, higher: bool) -> str | None:
    """A metric against the speedup: a colour for each method, a line for each of its other options.

    The front is numbered from its fastest variant; a legend below has the names.

    `None` if nothing has both.
    """
    rows = [
        row
        for row in summary.rows
        if row.speedup is not None and _value(row, metric) is not None and not _is_same(row)
    ]
    if not rows:
        return None
    names = sorted({_method(row) for row in rows})
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[_method(row), _but_density(row)].append(row)
    front = _front(rows, metric, higher)
    named = [row for point in front for row in rows if _point(row, metric) == point]
    others = [row for row in rows if row not in named] if len(rows) <= _LABELLED else []
    width = 0.6 + _width([row.label for row in rows])
    figure = _figure(max(5.9, width), 4.0 + _LINE * (len(groups) + len(named) + len(others)))
    axes = figure.add_subplot()
    for number, ((name, label), group) in enumerate(sorted(groups.items())):
        group.sort(key=lambda row: row.density)
        axes.plot(
            [row.speedup for row in group],
            [_value(row, metric) for row in group],
            marker=_MARKERS[number % len(_MARKERS)],
            lw=0.5,
            alpha=0.8,
            color="gray" if name == "dense" else f"C{names.index(name) % 10}",
            label=label,
        )
    axes.plot(*zip(*front, strict=True), color="black", lw=0.8, ls="--", zorder=0)
    _number(axes, [*named, *others], metric)
    axes.axvline(1, color="gray", lw=0.6)
    if metric == "psnr":
        axes.axhline(summary.target, color="gray", lw=0.6, ls=":")
    axes.set(xlabel="speedup of denoising over the fastest dense attention", ylabel=title)
    axes.margins(0.08)
    figure.legend(fontsize=7, loc="outside lower left", frameon=False, labelspacing=0.3)
    return _svg(figure)


def layer_densities(summary: Summary) -> str | None:
    """Measured density of each layer's sparse calls, a row for each variant."""
    rows = [r for r in summary.rows if not r.is_baseline and any(d is not None for d in r.layers)]
    if not rows:
        return None
    width = max(len(row.layers) for row in rows)
    values = np.full((len(rows), width), np.nan)
    for i, row in enumerate(rows):
        values[i, : len(row.layers)] = [np.nan if d is None else d for d in row.layers]
    return _heat(values, [row.label for row in rows], "layer", "density", top=1.0)


def call_heat(summary: Summary, key: str, title: str) -> str | None:
    """`error` or `kept` of each layer's calls, mean over heads and steps, variants as rows."""
    sums: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in _looked_at(summary.calls):
        sums[line["variant"]][line["layer"]] += line[key]
    if not sums:
        return None
    layers = 1 + max(layer for found in sums.values() for layer in found)
    values = np.full((len(sums), layers), np.nan)
    for i, found in enumerate(sums.values()):
        for layer, numbers in found.items():
            values[i, layer] = np.mean(numbers)
    return _heat(values, list(sums), "layer", title, top=1.0 if key == "kept" else None)


def head_heat(summary: Summary, variant: str, key: str, title: str) -> str | None:
    """`error` or `kept` of each head of each layer, mean over steps, for one variant."""
    own = [line for line in _looked_at(summary.calls) if line["variant"] == variant]
    if not own:
        return None
    layers, heads = 1 + max(line["layer"] for line in own), max(len(line[key]) for line in own)
    values: list[list[list[float]]] = [[[] for _ in range(layers)] for _ in range(heads)]
    for line in own:
        for head, number in enumerate(line[key]):
            values[head][line["layer"]].append(number)
    means = np.array([[np.mean(x) if x else np.nan for x in row] for row in values])
    labels = [f"head {head}" for head in range(heads)]
    return _heat(means, labels, "layer", f"{title}, {variant}", 1.0 if key == "kept" else None)


def step_errors(summary: Summary) -> str | None:
    """Mean error of the calls that were looked at, by denoising step; of a few variants."""
    sums: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in _looked_at(summary.calls):
        sums[line["variant"]][line["step"]] += line["error"]
    front = [row.label for row in summary.front]
    shown = sorted(sums, key=lambda name: name not in front)[: len(_MARKERS)]
    sums = {name: sums[name] for name in shown}
    if not sums or all(len(found) < 2 for found in sums.values()):
        return None
    figure = _figure(5.0 + _width(list(sums)), 3.6)
    axes = figure.add_subplot()
    for number, (name, found) in enumerate(sums.items()):
        steps = sorted(found)
        means = [float(np.mean(found[step])) for step in steps]
        axes.plot(steps, means, marker=_MARKERS[number % len(_MARKERS)], ms=4, label=name)
    axes.set(xlabel="denoising step", ylabel="relative error of attention", ylim=(0, None))
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _svg(figure)


def seconds(summary: Summary) -> str | None:
    """Where the time of a generation goes, a bar for each variant."""
    rows = [row for row in summary.rows if row.seconds]
    if not rows:
        return None
    labels = [row.label for row in rows][::-1]
    figure = _figure(4.5 + _width(labels), 1.0 + 0.2 * len(rows))
    axes = figure.add_subplot()
    left = np.zeros(len(rows))
    for part, name in (("encode", "text"), ("denoise", "denoising"), ("decode", "decoding")):
        values = np.array([row.seconds[part] for row in rows][::-1])
        axes.barh(labels, values, left=left, label=name)
        left += values
    axes.tick_params(labelsize=7)
    axes.set(xlabel="seconds")
    axes.margins(y=0.01)
    figure.legend(fontsize=7, loc="outside upper right", ncols=3, frameon=False)
    return _svg(figure)


def block_pictures(maps: Mapping[str, np.ndarray]) -> bytes | None:
    """WebP of maps of a few heads, dense mass beside what is read, a row for each variant."""
    if not maps:
        return None
    heads = max(len(pictures) for pictures in maps.values())
    figure = _figure(3.0 * heads, 1.8 * len(maps))
    # A title would widen the first of its panels, but not the row that it is of.
    parts = figure.subfigures(len(maps), 1, squeeze=False)[:, 0]
    for part, (label, pictures) in zip(parts, maps.items(), strict=True):
        part.suptitle(f"{label}: mass and what is read", fontsize=8, x=0.01, ha="left")
        panels = part.subplots(1, 2 * heads, squeeze=False)[0]
        for panel in panels[2 * len(pictures) :]:
            panel.set_axis_off()
        # Framed: rows and columns that read everything are as white as the page.
        for panel in panels:
            panel.set(xticks=[], yticks=[])
        for head, (mass, read) in enumerate(pictures.astype(np.float32)):
            panels[2 * head].imshow(mass**_GAMMA, cmap="magma")
            panels[2 * head + 1].imshow(read, cmap="gray", vmin=0, vmax=1)
    file = io.BytesIO()
    figure.savefig(file, format="webp", dpi=_DOTS, pil_kwargs={"quality": _QUALITY})
    return file.getvalue()


def _is_same(row: Row) -> bool:
    """Whether dense attention by another name: equal clips would stretch every axis."""
    return row.is_baseline and row.psnr in (None, math.inf)


def _value(row: Row, metric: str) -> float | None:
    if metric == "psnr":
        return None if row.psnr is None else min(row.psnr, _CEILING)
    if row.identical and row.quality.get("psnr") is None and metric == "ssim":
        return 1.0
    return row.quality.get(metric)


def _point(row: Row, metric: str) -> tuple[float, float]:
    return row.speedup or 0.0, _value(row, metric) or 0.0


def _front(rows: Sequence[Row], metric: str, higher: bool) -> list[tuple[float, float]]:
    sign = 1 if higher else -1
    points = sorted(
        (_point(row, metric) for row in rows),
        key=lambda p: (-p[0], -sign * p[1]),
    )
    best, found = -math.inf, []
    for speed, value in points:
        if sign * value > best:
            best = sign * value
            found.append((speed, value))
    return found


def _method(row: Row) -> str:
    return "dense" if row.is_baseline else row.label.split(" ")[0]


def _but_density(row: Row) -> str:
    """The label without what says how much is read, so that one line shows a sweep of it."""
    name, *options = row.label.split(" ")
    kept = [option for option in options if option.partition("=")[0] not in _AMOUNTS]
    return "dense" if row.is_baseline else " ".join([name, *kept])


def _number(axes: Any, rows: Sequence[Row], metric: str) -> None:
    """Numbers beside points, and lines of the legend that name them."""
    for number, row in enumerate(rows, start=1):
        axes.annotate(
            str(number), _point(row, metric), (4, 4), textcoords="offset points", fontsize=8
        )
        axes.plot([], [], ls="", label=f"{number}: {row.label}")


def _looked_at(calls: Sequence[Line]) -> list[Line]:
    return [line for line in calls if "failed" not in line]


def _heat(
    values: np.ndarray, labels: Sequence[str], xlabel: str, title: str, top: float | None
) -> str:
    rows, columns = values.shape
    width = max(1.6 + 0.3 * columns + _width(labels), 0.5 + 1.3 * _width([title]))
    figure = _figure(width, 1.2 + 0.2 * rows)
    axes = figure.add_subplot()
    finite = values[np.isfinite(values)]
    image = axes.imshow(
        np.ma.masked_invalid(values),
        aspect="auto",
        cmap="viridis",
        vmin=0.0,
        vmax=top or float(finite.max(initial=1e-6)),
    )
    axes.set_yticks(range(rows), labels, fontsize=7)
    axes.set_xticks(range(columns), [str(i) for i in range(columns)], fontsize=6)
    axes.set(xlabel=xlabel, title=title)
    axes.title.set_fontsize(9)
    if rows * columns <= _WRITTEN:
        _write_values(axes, values, image)
    figure.colorbar(image, ax=axes)
    return _svg(figure)


def _width(labels: Sequence[str]) -> float:
    """Inches of the longest label, which a plot must be wider by."""
    return _LETTER * max(map(len, labels), default=0)


def _write_values(axes: Any, values: np.ndarray, image: Any) -> None:
    middle = image.norm.vmax / 2
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if value < middle else "black"
            text = f"{value:.2f}".removeprefix("0")
            axes.text(column, row, text, ha="center", va="center", fontsize=5, color=colour)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


#: Every plot of a report: a name, and what makes it or has nothing to show.
Plot = tuple[str, Callable[[Summary], str | None]]
PLOTS: tuple[Plot, ...] = (
    ("PSNR", lambda s: pareto(s, "psnr", "PSNR against dense, dB", higher=True)),
    ("SSIM", lambda s: pareto(s, "ssim", "SSIM against dense", higher=True)),
    ("LPIPS", lambda s: pareto(s, "lpips", "LPIPS against dense", higher=False)),
    (
        "Features",
        lambda s: pareto(
            s, "cosine_EfficientNetLite0", "cosine distance, EfficientNetLite0", higher=False
        ),
    ),
    ("Seconds", seconds),
    ("Density by layer", layer_densities),
    ("Error by layer", lambda s: call_heat(s, "error", "relative error of attention outputs")),
    ("Kept mass by layer", lambda s: call_heat(s, "kept", "softmax mass that is read exactly")),
    ("Error by step", step_errors),
)
