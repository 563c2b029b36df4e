"""Orders of a token grid: permutations that bring neighbours in the picture close in the sequence.

Block-sparse attention pays off when the tokens that attend to each other share blocks. Every
function takes a `TokenGrid` and returns the `Permutation` from raster order (frame, row, column,
the last one fastest) to its own; `lift` puts it into a sequence with text around the grid.
"""

from __future__ import annotations

import difflib
from functools import cache, lru_cache
from itertools import permutations

import torch
from torch import Tensor

from dit_sparse.grid import Permutation, TokenGrid, TokenLayout

#: The six axis orders, slowest axis first.
AXES: tuple[str, ...] = tuple("".join(p) for p in permutations("FHW"))
#: Every name that `named` knows.
NAMES: tuple[str, ...] = ("raster", *AXES, "tile", "morton", "hilbert")


def raster(grid: TokenGrid, *, device: torch.device | str | None = None) -> Permutation:
    """The order that tokens already have: frame, row, column."""
    return Permutation(torch.arange(grid.length, device=device))


def axes(grid: TokenGrid, order: str, *, device: torch.device | str | None = None) -> Permutation:
    """Raster order with the axes exchanged (the reorderings of PARO, arXiv 2506.16054).

    Args:
        order: one of `AXES`, slowest axis first: `"HWF"` puts the frames of one place side by side.

    Raises:
        ValueError: `order` is not a permutation of the letters F, H and W.
    """
    if order not in AXES:
        raise ValueError(f"Expected an axis order of {', '.join(AXES)}, got {order!r}.")
    index = torch.arange(grid.length, device=device).view(grid.shape)
    return Permutation(index.permute(*map("FHW".index, order)).flatten())


def plain_axes(grid: TokenGrid, order: str) -> str:
    """The first of `AXES` that is the same order on this grid: an axis of one token moves nothing.

    Six orders of a video differ, two of an image.
    """
    wide = {axis for axis, extent in zip("FHW", grid.shape, strict=True) if extent > 1}
    return next(n for n in AXES if [a for a in n if a in wide] == [a for a in order if a in wide])


def tile(
    grid: TokenGrid, shape: tuple[int, int, int], *, device: torch.device | str | None = None
) -> Permutation:
    """Tiles in raster order, and inside a tile its tokens in raster order.

    Tiles need not divide the grid: those at the far borders are smaller, and nothing is padded.
    `tile_runs` gives their sizes (sliding tile attention, arXiv 2502.04507, needs them to divide).

    Args:
        shape: tokens of a tile along frames, rows and columns.

    Raises:
        ValueError: `shape` is not three integers of at least 1.
    """
    _check_tile(shape)
    tile_of_token = torch.zeros(grid.shape, dtype=torch.int64, device=device)
    for axis, (extent, edge) in enumerate(zip(grid.shape, shape, strict=True)):
        along = torch.arange(extent, device=device) // edge
        view = [-1 if a == axis else 1 for a in range(3)]
        tile_of_token = tile_of_token * -(-extent // edge) + along.view(view)
    return Permutation(tile_of_token.flatten().argsort(stable=True))


def tile_runs(grid: TokenGrid, shape: tuple[int, int, int]) -> list[int]:
    """Tokens of every tile, in the order of `tile(grid, shape)`; for `Blocks.of_runs`.

    Raises:
        ValueError: `shape` is not three integers of at least 1.
    """
    _check_tile(shape)
    frames, rows, columns = (
        [min(edge, extent - start) for start in range(0, extent, edge)]
        for extent, edge in zip(grid.shape, shape, strict=True)
    )
    return [f * r * c for f in frames for r in rows for c in columns]


def morton(grid: TokenGrid, *, device: torch.device | str | None = None) -> Permutation:
    """Z-order: tokens sorted by the interleaved bits of their coordinates, columns lowest.

    This is the curve of the smallest enclosing power-of-two cube with the tokens that are not in
    the grid left out.
    """
    coordinates = grid.coordinates(device)
    key = torch.zeros(grid.length, dtype=torch.int64, device=device)
    for bit in range((max(grid.shape) - 1).bit_length()):
        for place, axis in enumerate((2, 1, 0)):
            key |= (coordinates[:, axis] >> bit & 1) << (3 * bit + place)
    return Permutation(key.argsort())


def hilbert(grid: TokenGrid, *, device: torch.device | str | None = None) -> Permutation:
    """A Hilbert-like curve through a box of any size (Jakub Červený's generalised Hilbert curve).

    Successive tokens are neighbours when all sides longer than 1 are even; odd sides cost a few
    longer steps. The curve of a grid is remembered.
    """
    return _hilbert(grid).to(device or "cpu")


def lift(order: Permutation, layout: TokenLayout) -> Permutation:
    """Puts an order of `layout.grid` into the whole sequence; all other segments stay in place.

    Args:
        order: index `[n]` or `[H, n]`, n tokens of the layout's first grid.

    Returns:
        index `[N]` or `[H, N]`, N tokens of the layout.

    Raises:
        ValueError: `order` has another length than the grid.
    """
    if order.length != layout.grid.length:
        raise ValueError(
            f"Expected an order of the {layout.grid.length} tokens of grid {layout.grid}, "
            f"got {order}. Make it from the grid of the same layout."
        )
    start, stop = layout.grid_start, layout.grid_start + order.length
    index = torch.arange(layout.length, device=order.index.device)
    index = index.expand(*order.index.shape[:-1], -1).clone()
    index[..., start:stop] = order.index + start
    return Permutation(index)


def named(
    name: str,
    grid: TokenGrid,
    tile_shape: tuple[int, int, int] | None = None,
    *,
    device: torch.device | str | None = None,
) -> Permutation:
    """The order of one of the `NAMES`.

    Args:
        tile_shape: for `"tile"`, and only for it: see `tile`.

    Raises:
        ValueError: an unknown name; a tile shape without need, or none where one is needed.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name.lower(), [n.lower() for n in NAMES], n=1)
        hint = [f"Did you mean {n!r}?" for n in NAMES if n.lower() in near]
        raise ValueError(
            " ".join([f"Expected an order of {', '.join(NAMES)}, got {name!r}.", *hint])
        )
    if (name == "tile") != (tile_shape is not None):
        raise ValueError(
            f"Expected a tile shape for order 'tile' and for no other, got order {name!r} with "
            f"tile shape {tile_shape}. Give the one or leave out the other."
        )
    if tile_shape is not None:
        return tile(grid, tile_shape, device=device)
    if name in AXES:
        return axes(grid, name, device=device)
    curve = {"raster": raster, "morton": morton, "hilbert": hilbert}[name]
    return curve(grid, device=device)


def _check_tile(shape: tuple[int, int, int]) -> None:
    if len(shape) != 3 or not all(isinstance(edge, int) and edge >= 1 for edge in shape):
        raise ValueError(
            "Expected a tile shape of three integers of at least 1 (frames, rows, columns), "
            f"got {shape!r}."
        )


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a remembered curve must serve training too
def _hilbert(grid: TokenGrid) -> Permutation:
    """The curve, for all boxes of one depth of its recursion at a time."""
    # A box is its corner and three axis-aligned signed sides a, b, c; the curve enters at the
    # corner and leaves at the far end of a. The longest axis becomes a.
    first = max((2, 1, 0), key=lambda axis: grid.shape[axis])
    turns = {2: [2, 1, 0], 1: [1, 2, 0], 0: [0, 2, 1]}[first]
    sides = torch.diag(torch.tensor(grid.shape))[turns]
    boxes = torch.cat([torch.zeros(1, 3, dtype=torch.int64), sides])[None]
    while not bool(_is_line(boxes).all()):
        boxes = _divide(boxes)
    corner, extents = boxes[:, 0], boxes[:, 1:].abs().sum(-1)
    length, longest = extents.max(-1)
    along = boxes[torch.arange(len(boxes)), longest + 1].sign()
    box = torch.arange(len(boxes)).repeat_interleave(length)
    step = torch.arange(grid.length) - (length.cumsum(0) - length)[box]
    point = corner[box] + step[:, None] * along[box]
    return Permutation((point[:, 0] * grid.height + point[:, 1]) * grid.width + point[:, 2])


def _is_line(boxes: Tensor) -> Tensor:
    """bool `[n]`: at most one side of the box is longer than 1."""
    return (boxes[:, 1:].abs().sum(-1) == 1).sum(-1) >= 2


def _divide(boxes: Tensor) -> Tensor:
    """Replaces each box `[n, (corner, a, b, c), 3]` that is not a line by its parts, in order."""
    sides = boxes[:, 1:]
    length = sides.abs().sum(-1)
    half = sides >> 1
    # Halves of even length let the curve turn without a jump.
    odd = (half.abs().sum(-1) % 2 == 1) & (length > 2)
    half = half + sides.sign() * odd[..., None]
    basis = torch.cat([sides, half, sides.sign()], dim=1)

    a, b, c = length.unbind(-1)
    rule = torch.full_like(a, 4)
    rule[3 * c > 4 * b] = 3
    rule[3 * b > 4 * c] = 2
    rule[(2 * a > 3 * b) & (2 * a > 3 * c)] = 1
    rule[_is_line(boxes)] = 0

    table, parts = _rules()
    count = parts[rule]
    parent = torch.arange(len(boxes)).repeat_interleave(count)
    nth = torch.arange(len(parent)) - (count.cumsum(0) - count)[parent]
    divided = table[rule[parent], nth] @ basis[parent]
    divided[:, 0] += boxes[parent, 0]
    return divided[(divided[:, 1:].abs().sum(-1) > 0).all(-1)]


@cache
@torch.inference_mode(False)
def _rules() -> tuple[Tensor, Tensor]:
    """How a box is divided, as coefficients over its sides, their halves and their unit vectors.

    Returns:
        table: int64 `[5 rules, 5 parts, (corner, a, b, c), 9]`.
        parts: int64 `[5]`, how many parts each rule makes.
    """
    a, b, c, A, B, C, ua, ub, uc = torch.eye(9, dtype=torch.int64)
    o = torch.zeros_like(a)
    end_a, end_c, end_B, end_C = a - ua, c - uc, B - ub, C - uc  # last cell along each vector
    rules = [
        # A line stays as it is.
        [(o, a, b, c)],
        # Long along a: one half after the other.
        [(o, A, b, c), (A, a - A, b, c)],
        # c is short: a U-turn in the plane of a and b.
        [(o, B, c, A), (B, a, b - B, c), (end_a + end_B, -B, c, A - a)],
        # b is short: the same in the plane of a and c.
        [(o, C, A, b), (C, a, b, c - C), (end_a + end_C, -C, A - a, b)],
        # About a cube: five parts.
        [
            (o, B, C, A),
            (B, c, A, b - B),
            (end_B + end_c, a, -B, C - c),
            (end_a + B + end_c, -c, A - a, b - B),
            (end_a + end_B, -B, C, A - a),
        ],
    ]
    table = torch.zeros(5, 5, 4, 9, dtype=torch.int64)
    for number, rule in enumerate(rules):
        table[number, : len(rule)] = torch.stack([torch.stack(part) for part in rule])
    return table, torch.tensor([len(rule) for rule in rules])
