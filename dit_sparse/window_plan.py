"""A plan for windows along the axes of the grid, which may differ from head to head."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from dit_sparse import orders
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.list_lengths import much_longer
from dit_sparse.neighbourhood import Axis, Intervals
from dit_sparse.plan import BlockPlan
from dit_sparse.plan_lists import Surroundings, write_lists
from dit_sparse.predicate import BoxPredicate, DiskPredicate
from dit_sparse.tile_lists import Reach, Tiling, Visits, cuts

#: One rule for each of (frames, height, width).
Axes: TypeAlias = tuple[Axis, Axis, Axis]
_Intervals: TypeAlias = tuple[Intervals, ...]


def plan_windows(
    layout: TokenLayout,
    heads: Sequence[Axes],
    tile: tuple[int, int, int],
    block: int,
    device: torch.device,
) -> BlockPlan:
    """The plan in which image queries read the keys that are visible along all three axes.

    Text and reference images are read by all queries and read all keys; text padding is not read.

    Args:
        layout: the sequence.
        heads: the windows of each head, or of all heads; all with the same places, which means
            the same dilation and shift.
        tile: places of a tile along each axis; one of more than `block` tokens is cut into several.
        block: tokens a block holds at most.
        device: where the plan is made; does not wait for it.

    Raises:
        ValueError: heads of several dilations or shifts, a grid whose coordinates do not fit 31
            bits, or more entries than 32 bits number.
    """
    known = {axes: tuple(axis.intervals() for axis in axes) for axes in dict.fromkeys(heads)}
    tiling = tile_grid(known[heads[0]], tile, block, device)
    for axes, intervals in known.items():
        if not all(map(torch.equal, (i.position for i in intervals), tiling.position)):
            raise ValueError(
                f"Expected one dilation and one shift in all heads, got {axes} beside {heads[0]}."
            )
    reaches = {
        axes: [Reach.of(i, cut) for i, cut in zip(intervals, tiling.cuts, strict=True)]
        for axes, intervals in known.items()
    }
    visits = {axes: Visits.of(reach, device) for axes, reach in reaches.items()}
    box = None
    if any(_masked(reach) for reach in reaches.values()):
        box = _pack([known[axes] for axes in (known if len(known) == 1 else heads)], tiling, layout)
    plan = assemble(layout, tiling, [visits[axes] for axes in heads], block, box=box)
    context = plan.q_blocks.n - len(tiling.sizes)
    return replace(plan, uneven=_uneven([reaches[axes] for axes in heads], context), lasting=True)


def tile_grid(
    intervals: _Intervals, tile: tuple[int, int, int], block: int, device: torch.device
) -> Tiling:
    """Cuts a grid into tiles of at most `block` tokens, along the places of these intervals."""
    most = pieces(tile, block)
    along = [
        torch.tensor(cuts(axis.runs, t, m))
        for axis, t, m in zip(intervals, tile, most, strict=True)
    ]
    return Tiling(tuple(axis.position for axis in intervals), tuple(along), device)


def pieces(tile: tuple[int, int, int], block: int) -> tuple[int, int, int]:
    """The largest equal parts of a tile that hold at most `block` tokens: fewest, most cubic."""
    sizes = [sorted({-(-t // n) for n in range(1, t + 1)}) for t in tile]
    fitting = (s for s in itertools.product(*sizes) if math.prod(s) <= block)

    def parts(size: tuple[int, ...]) -> tuple[int, int]:
        return math.prod(-(-t // s) for t, s in zip(tile, size, strict=True)), sum(size)

    frames, rows, columns = min(fitting, key=parts)
    return frames, rows, columns


def assemble(
    layout: TokenLayout,
    tiling: Tiling,
    heads: Sequence[Visits],
    block: int,
    *,
    box: BoxPredicate | None = None,
    disk: DiskPredicate | None = None,
) -> BlockPlan:
    """The plan in which tiles of the grid read the tiles they visit, and the text.

    Args:
        heads: visits of each head; equal ones as the same object, which are written once.
        box, disk: masks those that are not full.
    """
    around = Surroundings.of(layout, tiling.sizes, block)
    same = all(visits is heads[0] for visits in heads)
    lists = write_lists(around, heads[:1] if same else heads)
    blocks = around.blocks.to(tiling.device)
    return BlockPlan(
        q_blocks=blocks,
        k_blocks=blocks,
        indices=lists.indices,
        offsets=lists.offsets,
        full=lists.full,
        partial=lists.rest,
        box=box,
        disk=disk,
        order=orders.lift(tiling.order(layout.grid), layout),
    )


def of_layout(values: Tensor, layout: TokenLayout, context: int) -> Tensor:
    """int32 `[N]`: a value per token of the grid put into the sequence, `context` elsewhere."""
    row = values.new_full((layout.length,), context)
    row[layout.grid_start : layout.grid_start + len(values)] = values
    return row.int()


def _uneven(heads: Sequence[Sequence[Reach]], context: int) -> bool:
    """Whether the picture's rows differ much in length; known without the lists.

    Args:
        heads: the reaches of each head.
        context: entries that every row has besides.
    """
    longest = max(math.prod(int(r.count.max()) for r in reaches) for reaches in heads)
    means = [math.prod(float(r.count.double().mean()) for r in reaches) for reaches in heads]
    return much_longer(longest + context, sum(means) / len(means) + context)


def _masked(reaches: Sequence[Reach]) -> bool:
    """Whether any visited pair of tiles is not all visible; known without the lists."""
    visited, full = (
        math.prod(int(counts.sum()) for counts in along)
        for along in ([r.count for r in reaches], [r.full_count for r in reaches])
    )
    return visited > full


def _pack(heads: Sequence[_Intervals], tiling: Tiling, layout: TokenLayout) -> BoxPredicate:
    """Places as coordinates in the fields of one int32 (see `BoxPredicate`)."""
    shifts, guard, ones = _fields(layout.grid)

    def packed(values: Sequence[Tensor]) -> Tensor:
        return tiling.spread([v << shift for v, shift in zip(values, shifts, strict=True)])

    at = packed([torch.arange(extent) for extent in layout.grid.shape])
    lower = [of_layout(packed([i.low for i in axes]), layout, 0) for axes in heads]
    upper = [of_layout(packed([i.high for i in axes]), layout, ones) for axes in heads]
    return BoxPredicate(
        lower=torch.stack(lower),
        upper=torch.stack(upper),
        above=of_layout(at, layout, ones),
        below=of_layout(at, layout, 0),
        guard=guard,
    )


def _fields(grid: TokenGrid) -> tuple[list[int], int, int]:
    """Shift of each axis' field, the guard bits, and all other bits."""
    shifts, guard, ones, shift = [], 0, 0, 0
    for extent in grid.shape:
        bits = (extent - 1).bit_length()
        shifts.append(shift)
        ones |= ((1 << bits) - 1) << shift
        guard |= 1 << (shift + bits)
        shift += bits + 1
    if shift > 31:
        raise ValueError(
            f"Expected a grid whose coordinates fit 31 bits (a guard bit per axis), got {grid}."
        )
    return shifts, guard, ones
