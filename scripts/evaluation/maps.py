"""Attention maps of captured calls, made in blocks of rows: none ever lies in memory whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.grid import TokenLayout
from scripts.evaluation.probe import Capture
from scripts.evaluation.structure import kind_of, numbers_of

SIDE = 512  # pixels of a map, at most
ZOOM_FRAMES = 4
_ROWS = 1024  # queries at a time


@dataclass(frozen=True, eq=False)
class HeadMap:
    """One head of one captured call.

    Attributes:
        layer, head, step: which.
        numbers: means over the picture's queries of `structure.numbers_of`.
        kind: of `structure.KINDS`.
        picture: float16 `[S, S]`, the map over the whole sequence in raster order, mean-pooled.
        zoom: float16, the same of `zoom_range`, finer.
    """

    layer: int
    head: int
    step: int
    numbers: dict[str, float]
    kind: str
    picture: Tensor
    zoom: Tensor

    def record(self) -> dict[str, Any]:
        """One line of the result."""
        numbers = {name: round(value, 4) for name, value in self.numbers.items()}
        return {
            "layer": self.layer,
            "head": self.head,
            "step": self.step,
            "kind": self.kind,
        } | numbers


def attention_rows(
    q: Tensor, k: Tensor, layout: TokenLayout, block: int
) -> Iterator[tuple[int, Tensor]]:
    """Blocks of softmax(q k^T / sqrt(D)) with their first row, float32 `[block, N]`.

    Padding of the text, as of the first batch entry, is no key.

    Args:
        q, k: `[N, D]` of one head.
    """
    hidden = torch.ones(len(k), dtype=torch.bool, device=k.device)
    for start, stop in layout.valid_ranges(0):
        hidden[start:stop] = False
    keys = k.float().T / math.sqrt(k.shape[1])
    for start in range(0, len(q), block):
        scores = q[start : start + block].float() @ keys
        yield start, scores.masked_fill(hidden, -torch.inf).softmax(-1)


def zoom_range(layout: TokenLayout) -> tuple[int, int]:
    """First and last position, exclusive, of a few frames in the middle of a clip; of a picture, of
    the rows that fit into `SIDE`.
    """
    frames, height, width = layout.grid.shape
    unit, units = (height * width, frames) if frames > 1 else (width, height)
    shown = min(units, ZOOM_FRAMES if frames > 1 else max(1, SIDE // width))
    start = layout.grid_start + (units - shown) // 2 * unit
    return start, start + shown * unit


def map_head(capture: Capture, head: int) -> HeadMap:
    """The map of one head and its numbers, in one pass over its rows."""
    layout, q, k = capture.layout, capture.q[head], capture.k[head]
    first, last = zoom_range(layout)
    whole, fine = _factor(len(q)), _factor(last - first)
    picture, zoom = [], []
    sums: dict[str, Tensor] = {}
    for start, rows in attention_rows(q, k, layout, _ROWS // whole * whole):
        picture.append(pool(rows, whole))
        zoom.append(rows[_within(start, len(rows), first, last), first:last])
        inside = _within(
            start, len(rows), layout.grid_start, layout.grid_start + layout.grid.length
        )
        queries = torch.arange(start, start + len(rows), device=rows.device)[inside]
        found = numbers_of(rows[inside], queries - layout.grid_start, layout)
        sums = {name: value.double().sum() + sums.get(name, 0) for name, value in found.items()}
    numbers = {name: float(value) / layout.grid.length for name, value in sums.items()}
    return HeadMap(
        layer=capture.layer,
        head=head,
        step=capture.step,
        numbers=numbers,
        kind=kind_of(numbers),
        picture=torch.cat(picture).half().cpu(),
        zoom=pool(torch.cat(zoom), fine).half().cpu(),
    )


def map_heads(captures: Sequence[Capture]) -> Iterator[HeadMap]:
    """The maps of all heads of captured calls."""
    for capture in captures:
        for head in range(len(capture.q)):
            yield map_head(capture, head)


def pool(rows: Tensor, factor: int) -> Tensor:
    """Means of squares of `factor` entries, times `factor`: what a query of the square puts into
    the keys of the square, on average. A ragged edge averages what it has.
    """
    return F.avg_pool2d(rows[None], factor, ceil_mode=True)[0] * factor


def _factor(tokens: int) -> int:
    return max(1, math.ceil(tokens / SIDE))


def _within(start: int, count: int, first: int, last: int) -> slice:
    return slice(max(0, first - start), max(0, min(count, last - start)))
