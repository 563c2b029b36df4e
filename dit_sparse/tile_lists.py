"""What tiles of queries visit, from windows along the axes: closed forms, on any device.

A tile of queries reads, along each axis, an interval of key tiles, and all of the keys of a smaller
interval of them; what it visits is the product. So lists are written directly from a few numbers
per axis and tile, without a matrix of blocks and without waiting for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from dit_sparse.grid import Permutation, TokenGrid
from dit_sparse.list_lengths import check_entries
from dit_sparse.neighbourhood import Intervals


def cuts(runs: Sequence[int], tile: int, most: int) -> list[int]:
    """Where an axis of places is cut: first place of every piece, and the end.

    Tiles start anew with every run, so that none holds places of two runs, unless they are larger
    than any run.

    Args:
        runs: lengths whose sum is the axis (`Intervals.runs`).
        tile: places of a tile.
        most: places of a piece; larger tiles are cut into several.
    """
    stretches = runs if tile <= max(runs) else [sum(runs)]
    found, end = [0], 0
    for run in stretches:
        for first in range(end, end + run, tile):
            stop = min(first + tile, end + run)
            found += [*range(first + most, stop, most), stop]
        end += run
    return found


def classes(intervals: Intervals, cut: Tensor) -> int:
    """The most queries of a tile with different windows; 0 on an axis of one place.

    Ends of intervals never fall, so equal ones are neighbours.
    """
    if len(intervals.low) == 1:
        return 0
    new = (intervals.low.diff() != 0) | (intervals.high.diff() != 0)
    before = torch.cat([new.new_zeros(1), new]).cumsum(0)
    return int((before[cut[1:] - 1] - before[cut[:-1]]).max()) + 1


@dataclass(frozen=True, eq=False)
class Reach:
    """Along one axis, of every tile of queries: an interval of key tiles, int64 `[T]` each.

    Args:
        first, count: the key tiles with at least one visible key.
        full_first, full_count: those whose keys are all visible to all queries of the tile.
    """

    first: Tensor
    count: Tensor
    full_first: Tensor
    full_count: Tensor

    @staticmethod
    def of(intervals: Intervals, cuts: Tensor) -> Reach:
        """Ends of intervals never fall, so those of a tile's first and last query say it all."""
        begin, last = cuts[:-1], cuts[1:] - 1
        first = torch.searchsorted(cuts, intervals.low[begin], right=True) - 1
        final = torch.searchsorted(cuts, intervals.high[last], right=True) - 1
        full_first = torch.searchsorted(cuts, intervals.low[last])
        full_final = torch.searchsorted(cuts, intervals.high[begin] + 1, right=True) - 2
        full_count = (full_final - full_first + 1).clamp(min=0)
        return Reach(first, final - first + 1, full_first, full_count)

    def to(self, device: torch.device) -> Reach:
        return Reach(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True, eq=False)
class Tiling:
    """A grid cut into tiles: boxes of places, in raster order.

    Args:
        position: per axis, int64 `[L]` on the CPU, the position at each place.
        cuts: per axis, int64 `[T + 1]` on the CPU, first place of each tile, and the end.
        device: where results are made.
    """

    position: tuple[Tensor, ...]
    cuts: tuple[Tensor, ...]
    device: torch.device

    @cached_property
    def sizes(self) -> Tensor:
        """int64 `[tiles]` on the CPU, tokens in each."""
        return product([cut.diff() for cut in self.cuts], torch.device("cpu"))

    @cached_property
    def _slot(self) -> Tensor:
        """int64 `[L1 * L2 * L3]`: where the token at each place stands in the order of tiles."""
        tile = [of_place(cut) for cut in self.cuts]
        length = [cut.diff()[t] for t, cut in zip(tile, self.cuts, strict=True)]
        inner = [torch.arange(len(t)) - cut[t] for t, cut in zip(tile, self.cuts, strict=True)]
        rows, columns = (len(cut) - 1 for cut in self.cuts[1:])
        number = total([tile[0] * (rows * columns), tile[1] * columns, tile[2]], self.device)
        before = (self.sizes.cumsum(0) - self.sizes).to(self.device)[number]
        frame = product([inner[0], length[1], length[2]], self.device)
        row = product([torch.ones_like(inner[0]), inner[1], length[2]], self.device)
        column = total([torch.zeros_like(t) for t in inner[:2]] + [inner[2]], self.device)
        return before + frame + row + column

    def order(self, grid: TokenGrid) -> Permutation:
        """From raster order of the grid to the order of tiles, raster inside each."""
        steps = (grid.height * grid.width, grid.width, 1)
        return Permutation(
            self.spread([p * step for p, step in zip(self.position, steps, strict=True)])
        )

    def spread(self, values: Sequence[Tensor]) -> Tensor:
        """For every token in the order of tiles the sum of its axes' values, given by place."""
        raster = total(values, self.device)
        return torch.empty_like(raster).index_copy_(0, self._slot, raster)


@dataclass(frozen=True, eq=False)
class Visits:
    """Pairs of a query tile and a key tile, row by row, keys ascending.

    Args:
        row, key: int64 `[E]`, numbers of the tiles.
        full: bool `[E]`, whether all elements are visible.
        rows: number of query tiles.
    """

    row: Tensor
    key: Tensor
    full: Tensor
    rows: int

    @staticmethod
    def of(reaches: Sequence[Reach], device: torch.device) -> Visits:
        """The products of reaches; the number of pairs is known beforehand."""
        entries = math.prod(int(reach.count.sum()) for reach in reaches)
        check_entries(entries)
        tiles = [len(reach.first) for reach in reaches]
        axes = [reach.to(device) for reach in reaches]
        count = product([axis.count for axis in axes], device)
        row = torch.arange(len(count), device=device).repeat_interleave(count, output_size=entries)
        rest = torch.arange(entries, device=device) - (count.cumsum(0) - count)[row]
        q_rest = row
        key = torch.zeros_like(row)
        full = torch.ones_like(row, dtype=torch.bool)
        scale = 1
        for axis, n in zip(reversed(axes), reversed(tiles), strict=True):
            q, q_rest = q_rest % n, q_rest // n
            width = axis.count[q]
            k, rest = axis.first[q] + rest % width, rest // width
            key += k * scale
            inner = k - axis.full_first[q]
            full &= (inner >= 0) & (inner < axis.full_count[q])
            scale *= n
        return Visits(row, key, full, len(count))

    def filtered(self, keep: Tensor, full: Tensor) -> Visits:
        """Those to keep, with other full ones; waits for the device."""
        return Visits(self.row[keep], self.key[keep], full[keep], self.rows)

    @cached_property
    def count(self) -> Tensor:
        """int64 `[rows]`."""
        zero = torch.zeros(self.rows, dtype=torch.int64, device=self.row.device)
        return zero.index_add_(0, self.row, torch.ones_like(self.row))

    @cached_property
    def n_full(self) -> Tensor:
        """int64 `[rows]`."""
        zero = torch.zeros(self.rows, dtype=torch.int64, device=self.row.device)
        return zero.index_add_(0, self.row, self.full.long())

    @cached_property
    def slot(self) -> Tensor:
        """int64 `[E]`: place of each pair in its row when full ones come first."""
        entry = torch.arange(len(self.row), device=self.row.device)
        full = self.full.cumsum(0) - self.full.long()  # full ones before this one
        full_rank = full - (self.n_full.cumsum(0) - self.n_full)[self.row]
        rank = entry - (self.count.cumsum(0) - self.count)[self.row]
        return torch.where(self.full, full_rank, self.n_full[self.row] + rank - full_rank)


def of_place(cut: Tensor) -> Tensor:
    """int64 `[L]`: the tile of each place of an axis with these cuts."""
    place = torch.arange(int(cut[-1]))
    return torch.searchsorted(cut, place, right=True) - 1


def product(values: Sequence[Tensor], device: torch.device) -> Tensor:
    """Products of three axes' values, in raster order."""
    a, b, c = (value.to(device) for value in values)
    return (a[:, None, None] * b[:, None] * c).flatten()


def total(values: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sums of three axes' values, in raster order."""
    a, b, c = (value.to(device) for value in values)
    return (a[:, None, None] + b[:, None] + c).flatten()
