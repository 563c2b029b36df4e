"""What kind of attention a head pays: numbers of its map, and a rule that names the kind.

The kinds compare three shapes around a query that hold about the same share of the picture, so that
none wins by its size: a box (near in every axis), a slab (the query's own frame; in a picture its
own rows) and a line (the query's place in all frames; in a picture its columns). In raster order a
box head is a band around the diagonal with fainter ones a frame away, a slab head a row of squares
on the diagonal, and a line head many parallel diagonals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dit_sparse.grid import TextSpan, TokenGrid, TokenLayout
from dit_sparse.tiling import Extents, span

WINDOW = 0.1  # volume of the window whose mass is reported
SHAPE = 0.04  # volume of the shapes that name a kind, unless one frame alone is more
MOST = 0.4  # of the mass on the picture: what a shape must hold to name a head
TEXT = 0.5  # of all mass: what text must hold to name a head
KINDS = ("local", "multi-diagonal", "frame-local", "row-local", "global", "text-sink")
#: What a head of each kind puts most of its mass into, apart from global ones.
HOLDS = {
    "local": "box",
    "multi-diagonal": "line",
    "frame-local": "slab",
    "row-local": "slab",
    "text-sink": "text",
}


@dataclass(frozen=True)
class Regions:
    """Boxes of tokens around every query of a grid, pushed inwards at the borders."""

    grid: TokenGrid

    @cached_property
    def extents(self) -> Mapping[str, Extents]:
        """Tokens per axis of each region.

        "window" has a tenth of the volume. "box", "slab" and "line" have about equal volumes.
        "frame" is the query's frame, and "place" its row and column in all frames; both exist in
        clips alone.
        """
        shape = self.grid.shape
        axes = [axis for axis, extent in enumerate(shape) if extent > 1] or [0]
        outer, *inner = axes
        volume = max(SHAPE, 1 / shape[outer])
        each = volume ** (1 / max(1, len(inner)))
        found = {
            "window": self._box(dict.fromkeys(axes, WINDOW ** (1 / len(axes)))),
            "box": self._box(dict.fromkeys(axes, volume ** (1 / len(axes)))),
            "slab": self._box({outer: volume}),
            "line": self._box(dict.fromkeys(inner, each)),
        }
        if shape[0] > 1:
            found |= {"frame": (1, *shape[1:]), "place": (shape[0], 1, 1)}
        return found

    def share(self, name: str) -> float:
        """Volume of a region over that of the grid."""
        return math.prod(self.extents[name]) / self.grid.length

    def mass(self, rows: Tensor, queries: Tensor, name: str) -> Tensor:
        """What each row of probabilities puts into a region around its query.

        Args:
            rows: `[R, grid.length]`.
            queries: int64 `[R]`, positions of the queries in the grid.
            name: of the region.
        """
        seen = rows.view(-1, *self.grid.shape)
        place = self.grid.coordinates(rows.device)[queries]
        for axis, (extent, width) in enumerate(
            zip(self.grid.shape, self.extents[name], strict=True)
        ):
            if width == extent:
                continue
            low, high = (
                bound.to(rows.device)[place[:, axis], None] for bound in span(extent, width, 1)
            )
            at = torch.arange(extent, device=rows.device)
            inside = (at >= low) & (at <= high)
            seen = seen * inside.view(-1, *(extent if a == axis else 1 for a in range(3)))
        return seen.sum((1, 2, 3))

    def _box(self, shares: Mapping[int, float]) -> Extents:
        """Odd numbers of tokens next to a share of some axes; all tokens of the others."""
        widths = [
            min(extent, 2 * int(shares[axis] * extent / 2) + 1) if axis in shares else extent
            for axis, extent in enumerate(self.grid.shape)
        ]
        return widths[0], widths[1], widths[2]


def numbers_of(rows: Tensor, queries: Tensor, layout: TokenLayout) -> dict[str, Tensor]:
    """Numbers of each row of an attention map, float32 `[R]`.

    "entropy" in nats; "best 10 %" and "best 20 %", the mass of a row's largest entries; "text", the
    mass on text; and the mass in each of the `Regions`.

    Args:
        rows: probabilities `[R, N]` over the whole sequence.
        queries: int64 `[R]`, positions of the queries in the grid, all in the picture.
        layout: the sequence.
    """
    regions, start = Regions(layout.grid), layout.grid_start
    picture = rows[:, start : start + layout.grid.length]
    keys = rows.shape[1]
    best = rows.topk(math.ceil(0.2 * keys)).values
    text = rows.new_zeros(len(rows))
    for begin, segment in layout.spans():
        if isinstance(segment, TextSpan):
            text = text + rows[:, begin : begin + segment.length].sum(1)
    return {
        "entropy": torch.special.entr(rows).sum(1),
        "best 10 %": best[:, : math.ceil(0.1 * keys)].sum(1),
        "best 20 %": best.sum(1),
        "text": text,
        **{name: regions.mass(picture, queries, name) for name in regions.extents},
    }


def kind_of(numbers: Mapping[str, float]) -> str:
    """The kind of a head from the means of its `numbers_of`.

    * text-sink: at least half of the mass is on text.
    * local, multi-diagonal, frame-local (row-local in a picture): of what is on the picture, the
      box, the line or the slab holds the most of the three and at least 40 %, in about 4 % of the
      volume.
    * global: anything else.
    """
    if numbers["text"] >= TEXT:
        return "text-sink"
    slab = "frame-local" if "frame" in numbers else "row-local"
    shapes = ("local", "multi-diagonal", slab)  # the earlier where masses are equal
    kind = max(shapes, key=lambda name: numbers[HOLDS[name]])
    return kind if numbers[HOLDS[kind]] >= MOST * (1 - numbers["text"]) else "global"
