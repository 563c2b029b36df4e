"""What tiles and strides make of a window, by counting: visited blocks and the speedup they allow.

A window is a box, so the key tiles that a tile of queries visits are an interval along each axis,
and every count is a product over the axes: hundreds of small operations, whatever the grid. The
counts are those of the plan that `dit_sparse.methods.window` makes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from dit_sparse.block_times import Work
from dit_sparse.grid import TokenGrid
from dit_sparse.neighbourhood import Borders, Neighbourhood
from dit_sparse.per_axis import AXES, Extents
from dit_sparse.tile_lists import Reach, classes, cuts

_LARGE = 2  # tiles of at least this part of a block get more strides


@dataclass(frozen=True)
class Candidate:
    """A tile and a stride for a window, and what they cost.

    Args:
        tile, stride: in tokens along (frames, height, width).
        blocks: blocks of the sequence, text included.
        visited: pairs of a query and a key block that are read.
        full: those of them without a masked element.
        masked_blocks: query blocks with entries that are masked.
        worst: the most entries of any query block of the picture.
        density: share of the score matrix that is computed.
        whole: whether every block of the picture holds as many tokens as a block may.
        classes: the most different windows in a tile, summed over the axes.
        dense_blocks: blocks of a dense kernel, of that size.
    """

    tile: Extents
    stride: Extents
    blocks: int
    visited: int
    full: int
    masked_blocks: int
    worst: int
    density: float
    whole: bool
    classes: int
    dense_blocks: int

    @property
    def dense(self) -> int:
        """Entries of a dense kernel."""
        return self.dense_blocks**2

    @property
    def partial(self) -> int:
        """Visited entries that are masked by coordinates."""
        return self.visited - self.full

    @property
    def bound(self) -> float:
        """Speedup over dense attention if every visited entry took as long as a dense one."""
        return self.dense / self.visited

    @property
    def worst_bound(self) -> float:
        """The same for the query block that reads most, which is what a single wave waits for."""
        return self.dense_blocks / self.worst

    @property
    def speedup(self) -> float:
        """Estimated speedup from the times that were measured for entries of each kind and for
        query blocks; over the same kernel, reading everything."""
        work = Work(
            self.blocks, self.full, self.partial, self.masked_blocks, self.whole, self.classes
        )
        return Work(self.dense_blocks, self.dense).time / work.time

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        derived = ("dense", "partial", "bound", "worst_bound", "speedup")
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True)
class Simulator:
    """Every way to cut a grid for a window.

    Args:
        grid: of the picture.
        window: tokens along (frames, height, width).
        block: tokens a block holds at most.
        text: further tokens that every query reads and that read everything.
        dilation, causal, borders: of the window along each axis; see `Neighbourhood`. Tiles count
            tokens of one dilation group.

    Raises:
        ValueError: a window larger than the grid, or sizes below 1 (text: below 0).
    """

    grid: TokenGrid
    window: Extents
    block: int = 128
    text: int = 0
    dilation: Extents = (1, 1, 1)
    causal: tuple[bool, bool, bool] = (False, False, False)
    borders: Borders = "inward"

    def __post_init__(self) -> None:
        self._rules((1, 1, 1))
        if self.block < 1 or self.text < 0:
            raise ValueError(
                f"Expected a block of at least 1 token and text of at least 0, got {self.block} "
                f"and {self.text}."
            )

    @property
    def limit(self) -> float:
        """Speedup if not one element outside the windows, of stride 1, were computed."""
        n, text = self.grid.length, self.text
        ends = [rule.intervals() for rule in self._rules((1, 1, 1))]
        pairs = math.prod(int((axis.high - axis.low + 1).sum()) for axis in ends)
        read = pairs + n * text + text * (n + text)
        return (n + text) ** 2 / read

    def candidates(
        self,
        *,
        strides: Iterable[Extents] | None = None,
        tiles: Iterable[Extents] | None = None,
    ) -> list[Candidate]:
        """Candidates, the fastest first; among equals the one with the most cubic tile.

        Args:
            strides: those to try; by default 1, so that each query has its own window, and for
                every tile once or twice its size along each axis, so that its queries share one,
                and the largest multiple that visits and masks no more.
            tiles: those to try; by default all of at most `block` tokens.
        """
        fixed = None if strides is None else tuple(strides)
        found = [
            self.count(tile, stride)
            for tile in (self._tiles() if tiles is None else tiles)
            for stride in (self._strides(tile) if fixed is None else fixed)
        ]
        return sorted(found, key=lambda c: (-c.speedup, sum(c.tile), c.stride))

    def count(self, tile: Extents, stride: Extents) -> Candidate:
        """One candidate.

        Raises:
            ValueError: a stride larger than the window, or a tile of more than `block` tokens.
        """
        if min(tile) < 1 or math.prod(tile) > self.block:
            raise ValueError(
                f"Expected a tile of 1 to {self.block} tokens, the block, got {tile}. Use larger "
                "blocks or a smaller tile."
            )
        axes = list(map(self._known, self._rules(stride), tile))
        tiles = math.prod(a.tiles for a in axes)
        text = math.ceil(self.text / self.block)
        around = 2 * tiles * text + text**2
        n, total = self.grid.length, self.grid.length + self.text
        area = math.prod(a.area for a in axes) + 2 * n * self.text + self.text**2
        return Candidate(
            tile=tile,
            stride=stride,
            blocks=tiles + text,
            visited=math.prod(a.visited for a in axes) + around,
            full=math.prod(a.full for a in axes) + around,
            masked_blocks=tiles - math.prod(a.clean for a in axes),
            worst=math.prod(a.worst for a in axes) + text,
            density=area / total**2,
            whole=math.prod(tile) == self.block and all(a.even for a in axes),
            classes=sum(a.classes for a in axes),
            dense_blocks=math.ceil(total / self.block),
        )

    def _tiles(self) -> list[Extents]:
        frames, height, width = (min(extent, self.block) for extent in self.grid.shape)
        return [
            (f, h, w)
            for f in range(1, frames + 1)
            for h in range(1, min(height, self.block // f) + 1)
            for w in range(1, min(width, self.block // (f * h)) + 1)
        ]

    def _strides(self, tile: Extents) -> list[Extents]:
        large = math.prod(tile) * _LARGE >= self.block
        along = [self._along(axis, t, large) for axis, t in enumerate(tile)]
        shared = (_triple(stride) for stride in itertools.product(*along))
        return list(dict.fromkeys([(1, 1, 1), *shared]))

    def _along(self, axis: int, tile: int, large: bool) -> list[int]:
        """Strides of one axis for a tile: once and twice its size, and for large tiles, which the
        fastest are among, the largest multiple below the window that visits and masks no more."""
        window = self.window[axis]
        near = sorted({min(tile, window), min(2 * tile, window)})
        if not large:
            return near

        def cost(stride: int) -> tuple[int, int]:
            rule = self._rules(tuple(stride if a == axis else 1 for a in range(3)))[axis]  # type: ignore[arg-type]
            found = self._known(rule, tile)
            return found.visited, found.visited - found.full

        least = min(map(cost, near))
        last = (window - 1) // tile * tile  # a stride of the window leaves no overlap
        far = (s for s in range(last, 2 * tile, -tile) if cost(s) <= least)
        return near + list(itertools.islice(far, 1))

    @cached_property
    def _counts(self) -> dict[tuple[Neighbourhood, int], _Axis]:
        return {}

    def _known(self, rule: Neighbourhood, tile: int) -> _Axis:
        if (rule, tile) not in self._counts:
            self._counts[rule, tile] = _Axis.of(rule, tile)
        return self._counts[rule, tile]

    def _rules(self, stride: Extents) -> list[Neighbourhood]:
        numbers = zip(
            self.grid.shape, self.window, stride, self.dilation, self.causal, AXES, strict=True
        )
        return [Neighbourhood(n, w, s, d, c, self.borders, axis) for n, w, s, d, c, axis in numbers]


class _Axis(NamedTuple):
    """Along one axis: tiles, pairs of tiles with a visible key, pairs with all visible, tiles with
    no other pairs, the most pairs of one tile, pairs of tokens in visited tiles, whether all tiles
    are of one size, and the most different windows in a tile."""

    tiles: int
    visited: int
    full: int
    clean: int
    worst: int
    area: int
    even: bool
    classes: int

    @staticmethod
    def of(rule: Neighbourhood, tile: int) -> _Axis:
        intervals = rule.intervals()
        cut = torch.tensor(cuts(intervals.runs, tile, tile))
        reach = Reach.of(intervals, cut)
        keys = cut[reach.first + reach.count] - cut[reach.first]
        return _Axis(
            tiles=len(cut) - 1,
            visited=int(reach.count.sum()),
            full=int(reach.full_count.sum()),
            clean=int((reach.count == reach.full_count).sum()),
            worst=int(reach.count.max()),
            area=int((cut.diff() * keys).sum()),
            even=(len(cut) - 1) * tile == rule.extent,
            classes=classes(intervals, cut),
        )


def _triple(values: Sequence[int]) -> Extents:
    frames, height, width = values
    return frames, height, width
