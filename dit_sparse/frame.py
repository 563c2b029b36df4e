"""What a plan made from q and k has in common for all calls on a layout: order, blocks, text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from dit_sparse import orders
from dit_sparse.grid import Permutation, TextSpan, TokenGrid, TokenLayout
from dit_sparse.plan import Blocks


@dataclass(frozen=True, eq=False)
class Frame:
    """A layout cut into blocks, each of the picture, of text, or of padding alone.

    Args:
        blocks: of queries and of keys.
        order: leads from the model's order to that of the blocks; `None`: they are the same.
        context: bool `[n]`, blocks of text and of reference images, which read and are read by all.
        hidden: bool `[1 or B, n]`, blocks of text padding; `None` without any.
        first: bool `[n]`, blocks with tokens of the picture's first frame.
        candidates: how many blocks are of the picture.
    """

    blocks: Blocks
    order: Permutation | None
    context: Tensor
    hidden: Tensor | None
    first: Tensor
    candidates: int

    @property
    def has_context(self) -> bool:
        return self.candidates < self.blocks.n

    @cached_property
    def in_order(self) -> Frame:
        """The same blocks of tokens that stand in the order already."""
        return replace(self, order=None)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a remembered frame must serve training too
def frame_of(
    layout: TokenLayout,
    block: int,
    order: str = "raster",
    tile: tuple[int, int, int] | None = None,
    device: torch.device | None = None,
) -> Frame:
    """The frame of a layout; remembered, since every call of a generation asks for it.

    Args:
        block: tokens a block holds at most.
        order: one of `orders.NAMES`, for the picture's tokens.
        tile: for the order `"tile"`; by default the most even tile of `block` tokens.

    Raises:
        ValueError: an unknown order, or a tile for another one.
    """
    grid = layout.grid
    if order == "tile" and tile is None:
        tile = even_tile(grid, block)
    placed = None if order == "raster" else orders.named(order, grid, tile)
    runs = [grid.length] if tile is None else orders.tile_runs(grid, tile)
    blocks = Blocks.of_runs(_runs(layout, runs), block)
    lifted = None if placed is None else orders.lift(placed, layout)
    starts = blocks.starts[:-1].long()
    start, stop = layout.grid_start, layout.grid_start + grid.length
    context = (starts < start) | (starts >= stop)
    picture = (~context).nonzero()[:, 0].tolist()
    blocks = replace(blocks, picture=range(picture[0], picture[-1] + 1))
    first = _first_frame(layout, blocks, lifted)
    hidden = _padding(layout, starts)
    frame = Frame(
        blocks=blocks.to(device or "cpu"),
        order=None if lifted is None else lifted.to(device or "cpu"),
        context=context.to(device),
        hidden=None if hidden is None else hidden.to(device),
        first=first.to(device),
        candidates=len(picture),
    )
    frame.blocks.__dict__.update(total=blocks.total, ragged=blocks.ragged)  # known on the host
    return frame


def even_tile(grid: TokenGrid, block: int) -> tuple[int, int, int]:
    """A tile of at most `block` tokens: the smallest side is doubled while there is room, columns
    before rows before frames. 64 tokens of an image are 8 x 8, of a video 4 x 4 x 4."""
    tile = [1, 1, 1]
    while True:
        growing = [a for a in (2, 1, 0) if tile[a] < grid.shape[a]]
        if not growing or 2 * tile[0] * tile[1] * tile[2] > block:
            return tile[0], tile[1], tile[2]
        tile[min(growing, key=lambda axis: tile[axis])] *= 2


def _runs(layout: TokenLayout, picture: list[int]) -> list[int]:
    """Token runs that no block may straddle: the picture's, text spans, where padding begins."""
    runs: list[int] = []
    seen = False
    for segment in layout.segments:
        if isinstance(segment, TextSpan):
            cuts = sorted({0, segment.length, *(segment.valid or ())})
            runs += [b - a for a, b in pairwise(cuts)]
        elif seen:
            runs.append(segment.length)
        else:
            runs += picture
            seen = True
    return runs


def _first_frame(layout: TokenLayout, blocks: Blocks, order: Permutation | None) -> Tensor:
    start, grid = layout.grid_start, layout.grid
    token = torch.arange(layout.length) if order is None else order.index
    inside = (token >= start) & (token < start + grid.height * grid.width)
    count = torch.zeros(blocks.n, dtype=torch.int64).index_add_(0, blocks.of_token, inside.long())
    return count > 0


def _padding(layout: TokenLayout, starts: Tensor) -> Tensor | None:
    """bool `[B, n]`: blocks without a real token."""
    if layout.batch is None:
        return None
    hidden = torch.ones(layout.batch, len(starts), dtype=torch.bool)
    for entry in range(layout.batch):
        for start, stop in layout.valid_ranges(entry):
            hidden[entry, (starts >= start) & (starts < stop)] = False
    return hidden
