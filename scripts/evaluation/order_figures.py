"""Pictures of a calibration: maps of heads before and after reordering, and the chosen orders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_sparse import orders
from dit_sparse.calibration import Calibration
from dit_sparse.grid import Permutation
from scripts.evaluation.maps import SIDE, attention_rows, pool
from scripts.evaluation.probe import Capture

_ROWS = 1024  # queries at a time
_GAMMA = 0.35  # of the colour scale: a few large entries would leave the rest black
_BRIGHTEST = 0.999  # quantile of a map that gets the brightest colour


def map_in_order(capture: Capture, head: int, order: Permutation | None) -> Tensor:
    """The picture's part of a head's map, mean-pooled: `[S, S]`, S at most `maps.SIDE`."""
    layout = capture.layout
    q, k = capture.q[head], capture.k[head]
    inside = slice(layout.grid_start, layout.grid_start + layout.grid.length)
    factor = max(1, -(-layout.grid.length // SIDE))
    index = torch.arange(layout.grid.length, device=q.device)
    if order is not None:
        index = order.index.to(q.device)
    queries = q[inside][index]
    parts = []
    for _, rows in attention_rows(queries, k, layout, _ROWS // factor * factor):
        parts.append(pool(rows[:, inside][:, index], factor))
    return torch.cat(parts).cpu()


def draw_reordered(
    captures: Sequence[Capture], calibration: Calibration, path: Path, count: int = 6
) -> int:
    """Heads that left raster order: the map before, after, and the blocks that the mask reads.

    Args:
        captures: calls to take heads from; of a layer's, the middle one.
        calibration: of the same model, grid and steps.
        path: picture to write.
        count: of heads, spread over those that qualify.

    Returns:
        How many heads are shown; none, and no file, if all stay in raster order.
    """
    grid, raster = calibration.grid, orders.AXES[0]
    of_layer: dict[int, list[Capture]] = {}
    for capture in captures:
        of_layer.setdefault(capture.layer, []).append(capture)
    places = [
        (capture, head, name)
        for capture in (calls[len(calls) // 2] for calls in of_layer.values())
        for head, name in enumerate(calibration.order_names(capture.layer))
        if orders.plain_axes(grid, name) != raster
    ]
    picks = torch.linspace(0, len(places) - 1, min(count, len(places))).round().long().tolist()
    if not picks:
        return 0
    from matplotlib.figure import Figure

    title = f"{calibration.model.name}: {grid} tokens, before and after reordering"
    figure = Figure(figsize=(2.6 * len(picks), 8.6), layout="constrained")
    axes = figure.subplots(3, len(picks), squeeze=False)
    for panel in axes.flat:
        panel.set_axis_off()
    figure.suptitle(title, fontsize=9)
    for column, number in enumerate(picks):
        capture, head, name = places[number]
        where = f"layer {capture.layer} head {head} step {capture.step}"
        _show(axes[0, column], map_in_order(capture, head, None), f"{where}\nFHW")
        order = orders.axes(grid, name)
        _show(axes[1, column], map_in_order(capture, head, order), name)
        segment = calibration.segments[capture.step]
        read = calibration.mask(segment, capture.layer)[head]
        share = float(read.float().mean())
        axes[2, column].imshow(read.numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes[2, column].set_title(f"blocks read: {share:.0%}", fontsize=8)
    _save(figure, path)
    return len(picks)


def _show(panel: Any, picture: Tensor, title: str) -> None:
    from matplotlib.colors import PowerNorm

    top = float(picture.quantile(_BRIGHTEST)) or float(picture.max())
    panel.imshow(picture.numpy(), cmap="magma", norm=PowerNorm(_GAMMA, 0, top, clip=True))
    panel.set_title(title, fontsize=8)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, pil_kwargs={"quality": 85} if path.suffix == ".webp" else {})


def draw_orders(calibration: Calibration, path: Path) -> None:
    """The order of each head: layers as rows, heads as columns, a colour for each order."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    layers, heads = calibration.layers, calibration.heads
    figure = Figure(figsize=(1.6 + 0.42 * heads, 1.2 + 0.3 * layers), layout="constrained")
    axes: Any = figure.subplots()
    colours = ["#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377"]
    numbers = calibration.orders.numpy()
    axes.imshow(numbers, cmap=ListedColormap(colours), vmin=-0.5, vmax=5.5, aspect="auto")
    for layer in range(layers):
        for head, name in enumerate(calibration.order_names(layer)):
            axes.text(head, layer, name, ha="center", va="center", fontsize=6, color="white")
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers))
    criterion = calibration.provenance.get("settings", {}).get("criterion", "")
    axes.set_title(f"{calibration.model.name}: order of each head ({criterion})", fontsize=8)
    _save(figure, path)
