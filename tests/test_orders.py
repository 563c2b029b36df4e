"""Orders of the grid."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse import orders
from dit_sparse.grid import Permutation, TextSpan, TokenGrid, TokenLayout
from dit_sparse.plan import Blocks

grids = st.builds(TokenGrid, st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))
tiles = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7))
RAGGED = [TokenGrid(13, 30, 45), TokenGrid(1, 83, 83), TokenGrid(21, 45, 80)]


def places(grid: TokenGrid, order: Permutation) -> list[tuple[int, ...]]:
    return [tuple(c) for c in grid.coordinates()[order.index].tolist()]


def cut_by(grid: TokenGrid, shape: tuple[int, int, int]) -> list[tuple[int, ...]]:
    """Tiles one by one, the slow way."""
    corners = itertools.product(
        *(range(0, extent, edge) for extent, edge in zip(grid.shape, shape, strict=True))
    )
    return [
        place
        for corner in corners
        for place in itertools.product(
            *(
                range(start, min(start + edge, extent))
                for start, edge, extent in zip(corner, shape, grid.shape, strict=True)
            )
        )
    ]


@given(grids)
def test_every_order_is_a_permutation(grid):
    for name in orders.NAMES:
        order = orders.named(name, grid, (2, 3, 4) if name == "tile" else None).check()
        assert order.length == grid.length


@pytest.mark.parametrize("grid", RAGGED, ids=str)
@pytest.mark.parametrize("name", orders.NAMES)
def test_real_grids(grid, name):
    order = orders.named(name, grid, (4, 8, 8) if name == "tile" else None)
    assert order.check().length == grid.length


@pytest.mark.parametrize("order", orders.AXES)
def test_axis_orders_sort_by_the_named_axes(order):
    grid = TokenGrid(2, 3, 4)
    columns = ["FHW".index(axis) for axis in order]
    got = [tuple(p[c] for c in columns) for p in places(grid, orders.axes(grid, order))]
    assert got == sorted(got)


def test_raster_is_the_first_axis_order():
    grid = TokenGrid(2, 3, 4)
    assert torch.equal(orders.raster(grid).index, torch.arange(24))
    assert torch.equal(orders.axes(grid, "FHW").index, torch.arange(24))


@given(grids, tiles)
def test_tiles(grid, shape):
    assert places(grid, orders.tile(grid, shape)) == cut_by(grid, shape)


@given(grids, tiles, st.integers(1, 20))
def test_tile_runs_keep_blocks_inside_a_tile(grid, shape, size):
    runs = orders.tile_runs(grid, shape)
    assert sum(runs) == grid.length
    blocks = Blocks.of_runs(runs, size).starts.tolist()
    tokens = places(grid, orders.tile(grid, shape))
    for start, stop in itertools.pairwise(blocks):
        seen = {tuple(x // e for x, e in zip(p, shape, strict=True)) for p in tokens[start:stop]}
        assert len(seen) == 1


@pytest.mark.parametrize("shape", [(0, 1, 1), (1, -2, 1), (1, 1, 1.5), (4, 4)])
def test_tiles_refuse_shapes(shape):
    for function in (orders.tile, orders.tile_runs):
        with pytest.raises(ValueError, match="tile shape of three integers"):
            function(TokenGrid(2, 2, 2), shape)


@given(grids)
def test_morton_interleaves_bits(grid):
    def key(place: tuple[int, ...]) -> str:
        return "".join("".join(bits) for bits in zip(*(f"{x:08b}" for x in place), strict=True))

    got = [key(p) for p in places(grid, orders.morton(grid))]
    assert got == sorted(got)


def test_morton_blocks_of_a_power_of_two_grid_are_cubes():
    grid = TokenGrid(4, 4, 8)
    blocks = grid.coordinates()[orders.morton(grid).index].view(-1, 8, 3)
    assert bool((blocks.amax(1) - blocks.amin(1) == 1).all())


def steps(grid: TokenGrid) -> torch.Tensor:
    return grid.coordinates()[orders.hilbert(grid).index].diff(dim=0).abs().sum(-1)


@given(st.tuples(st.integers(0, 5), st.integers(1, 8), st.integers(1, 8)))
def test_hilbert_takes_unit_steps_on_even_grids(halves):
    grid = TokenGrid(max(2 * halves[0], 1), 2 * halves[1], 2 * halves[2])
    assert int(steps(grid).max()) == 1


@pytest.mark.parametrize(
    ("grid", "longer"),
    [
        (TokenGrid(13, 30, 45), 151),
        (TokenGrid(18, 45, 80), 96),
        (TokenGrid(18, 48, 80), 0),
        (TokenGrid(1, 83, 83), 1),
    ],
    ids=str,
)
def test_hilbert_rarely_takes_longer_steps(grid, longer):
    lengths = steps(grid)
    assert int((lengths > 1).sum()) <= longer
    assert int(lengths.max()) <= 2


def test_hilbert_blocks_are_more_compact_than_raster_runs():
    grid, size = TokenGrid(8, 16, 16), 64
    coordinates = grid.coordinates()

    def spread(order: Permutation) -> float:
        blocks = coordinates[order.index].view(-1, size, 3)
        return float((blocks.amax(1) - blocks.amin(1)).sum(-1).double().mean())

    assert spread(orders.hilbert(grid)) < 0.7 * spread(orders.raster(grid))


def test_hilbert_is_remembered_and_serves_training():
    with torch.inference_mode():
        order = orders.hilbert(TokenGrid(3, 5, 7))
    assert order is orders.hilbert(TokenGrid(3, 5, 7))
    x = torch.randn(1, 1, 105, requires_grad=True)
    order(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize(
    "layout",
    [
        TokenLayout.of(TokenGrid(2, 2, 3)),
        TokenLayout.of(TokenGrid(2, 2, 3), text_first=5),
        TokenLayout.of(TokenGrid(2, 2, 3), text_last=4),
        TokenLayout.of(TokenGrid(2, 2, 3), 3, 2, TokenGrid(1, 2, 2), TokenGrid(1, 1, 4)),
        TokenLayout((TextSpan(4, (2, 3)), TokenGrid(2, 2, 3), TextSpan(2))),
    ],
    ids=str,
)
def test_lift_moves_only_the_first_grid(layout, heads):
    inner = orders.hilbert(layout.grid)
    if heads:
        inner = Permutation(torch.stack([inner.index, orders.axes(layout.grid, "WHF").index]))
    lifted = orders.lift(inner, layout).check()
    assert lifted.index.shape == (*inner.index.shape[:-1], layout.length)
    start, n = layout.grid_start, inner.length
    expected = torch.arange(layout.length)
    for lifted_row, row in zip(
        lifted.index.view(-1, layout.length), inner.index.view(-1, n), strict=True
    ):
        assert torch.equal(lifted_row[start : start + n], row + start)
        assert torch.equal(lifted_row[:start], expected[:start])
        assert torch.equal(lifted_row[start + n :], expected[start + n :])


def test_lift_refuses_another_grid():
    with pytest.raises(ValueError, match=r"12 tokens of grid 1x3x4.*same layout"):
        orders.lift(orders.raster(TokenGrid(1, 4, 4)), TokenLayout.of(TokenGrid(1, 3, 4), 2))


@pytest.mark.parametrize(
    ("name", "hint"),
    [("hilbrt", "'hilbert'"), ("Morton", "'morton'"), ("fhw", "'FHW'"), ("tiles", "'tile'")],
)
def test_named_suggests_the_nearest(name, hint):
    with pytest.raises(ValueError, match=f"Did you mean {hint}"):
        orders.named(name, TokenGrid(1, 2, 2))


def test_named_has_no_suggestion_for_nonsense():
    with pytest.raises(ValueError, match="Expected an order of raster") as error:
        orders.named("xyzzy", TokenGrid(1, 2, 2))
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize(("name", "shape"), [("tile", None), ("hilbert", (1, 2, 2))])
def test_named_refuses_a_missing_or_idle_tile(name, shape):
    with pytest.raises(ValueError, match="tile shape for order 'tile'"):
        orders.named(name, TokenGrid(1, 4, 4), shape)


def test_axes_refuse_other_letters():
    with pytest.raises(ValueError, match="axis order"):
        orders.axes(TokenGrid(1, 2, 2), "FFW")
