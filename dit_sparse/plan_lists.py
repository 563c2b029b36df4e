"""The lists of a whole sequence: what tiles of the picture visit, with the context around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.grid import TextSpan, TokenLayout
from dit_sparse.list_lengths import check_entries
from dit_sparse.plan import Blocks
from dit_sparse.tile_lists import Visits


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
        blocks = replace(blocks, picture=range(first, first + len(tiles)))
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
