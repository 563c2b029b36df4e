"""From windows along the axes to a plan's lists: closed forms per tile, on any device.

A tile of queries reads, along each axis, an interval of key tiles, and all of the keys of a smaller
interval of them; what it visits is the product. So lists are written directly from a few numbers
per axis and tile, without a matrix of blocks and without waiting for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.grid import Permutation, TextSpan, TokenGrid, TokenLayout
from dit_sparse.neighbourhood import Intervals
from dit_sparse.plan import Blocks


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


@dataclass(frozen=True, eq=False)
class Surroundings:
    """The blocks of a whole sequence: those of the picture, and the context around them.

    Args:
        blocks: every tile of the picture is one, text and reference images are cut by length.
        first: number of the picture's first block.
        tiles: how many blocks the picture has.
        context: per batch entry the numbers of the context's blocks that are no padding.
    """

    blocks: Blocks
    first: int
    tiles: int
    context: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(layout: TokenLayout, sizes: Tensor, block: int) -> Surroundings:
        tiles = sizes.tolist()
        runs: list[list[int]] = []
        for start, segment in layout.spans():
            if isinstance(segment, TextSpan):
                edges = sorted({0, segment.length, *(segment.valid or ())})  # where padding begins
                runs.append([b - a for a, b in pairwise(edges)])
            else:
                runs.append(tiles if start == layout.grid_start else [segment.length])
        blocks = Blocks.of_runs([n for run in runs for n in run], block)
        starts = blocks.starts[:-1].tolist()
        first = starts.index(layout.grid_start)
        outside = [i for i in range(blocks.n) if not first <= i < first + len(tiles)]
        whole = [(0, layout.length)]
        context = []
        for entry in range(layout.batch or 1):
            real = whole if layout.batch is None else layout.valid_ranges(entry)
            context.append(tuple(i for i in outside if any(a <= starts[i] < b for a, b in real)))
        return Surroundings(blocks, first, len(tiles), tuple(context))


class Lists(NamedTuple):
    """The lists of a plan: `BlockPlan`'s fields of these names, and the entries behind the full
    ones (`rest`)."""

    indices: Tensor
    offsets: Tensor
    full: Tensor
    rest: Tensor


def write_lists(around: Surroundings, heads: Sequence[Visits]) -> Lists:
    """Lists in which the picture reads `heads` and the context, and the context everything.

    Args:
        heads: visits of each head, in tiles; heads that share an object share lists.
    """
    parts: list[Tensor] = []
    rows: tuple[list[Tensor], ...] = ([], [], [])  # offsets, full, rest
    written = 0
    for context in around.context:
        number = around.first + torch.arange(around.tiles)
        before, after = ([i for i in context if (i > around.first) == late] for late in (0, 1))
        every = torch.tensor([*before, *number.tolist(), *after])
        start_every, written = written, written + len(every)
        parts.append(every.to(heads[0].row.device))
        known: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for visits in heads:
            if id(visits) not in known:
                part, row_start = _rows(visits, around.first, before, after)
                n_context = len(context)
                known[id(visits)] = (
                    _framed(around, written + row_start, start_every),
                    _framed(around, visits.n_full + n_context, len(every)),
                    _framed(around, visits.count - visits.n_full, 0),
                )
                parts.append(part)
                written += len(part)
            for collected, row in zip(rows, known[id(visits)], strict=True):
                collected.append(row)
    check_entries(written)
    shape = (len(around.context), len(heads), around.blocks.n)
    return Lists(torch.cat(parts).int(), *(torch.stack(r).view(shape).int() for r in rows))


def _rows(visits: Visits, first: int, before: list[int], after: list[int]) -> tuple[Tensor, Tensor]:
    """Lists of the picture's rows for one head, and where each row starts.

    A row is the context before the picture, full tiles, the context behind it, other tiles.
    """
    device = visits.row.device
    extra = len(before) + len(after)
    length = visits.count + extra
    start = length.cumsum(0) - length
    entries = len(visits.row) + visits.rows * extra
    indices = torch.empty(entries, dtype=torch.int64, device=device)
    at = start[visits.row] + visits.slot + len(before)
    indices[at + torch.where(visits.full, 0, len(after))] = visits.key + first
    for numbers, begin in ((before, start), (after, start + len(before) + visits.n_full)):
        if numbers:
            slots = begin[:, None] + torch.arange(len(numbers), device=device)
            indices[slots] = torch.tensor(numbers, device=device).expand_as(slots)
    return indices, start


def _framed(around: Surroundings, rows: Tensor, context: int) -> Tensor:
    """Numbers of the picture's rows between those of the context's."""
    framed = rows.new_full((around.blocks.n,), context)
    framed[around.first : around.first + around.tiles] = rows
    return framed


def check_entries(entries: int) -> None:
    """Raises `ValueError` for more entries than 32 bits number."""
    if entries > torch.iinfo(torch.int32).max:
        raise ValueError(
            f"Expected at most 2**31 - 1 entries in a plan, got {entries}. Use a smaller window, "
            "or larger blocks."
        )


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
