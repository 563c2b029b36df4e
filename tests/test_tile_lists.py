"""Cuts, tiles and lists, by counting."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse import orders
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.list_lengths import check_entries
from dit_sparse.neighbourhood import Neighbourhood, Rolled, whole
from dit_sparse.tile_lists import Reach, Visits, cuts
from dit_sparse.window_plan import pieces, plan_windows, tile_grid

CPU = torch.device("cpu")


class TestCuts:
    def test_by_eye(self):
        assert cuts([10], 4, 4) == [0, 4, 8, 10]
        assert cuts([5, 4], 2, 2) == [0, 2, 4, 5, 7, 9], "tiles start anew with a run"
        assert cuts([3, 2], 4, 4) == [0, 4, 5], "a tile larger than any run holds several"
        assert cuts([12], 6, 4) == [0, 4, 6, 10, 12], "a large tile is cut into pieces"

    @given(
        st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 12), st.integers(1, 12)
    )
    def test_cover_and_never_straddle(self, runs: list[int], tile: int, most: int):
        found = cuts(runs, tile, most)
        sizes = [b - a for a, b in itertools.pairwise(found)]
        assert found[0] == 0
        assert found[-1] == sum(runs)
        assert all(1 <= size <= min(tile, most) for size in sizes)
        if tile <= max(runs):
            assert set(itertools.accumulate(runs)) <= set(found)


@given(st.tuples(*[st.integers(1, 14)] * 3), st.sampled_from([4, 64, 128]))
def test_pieces_fit_and_are_as_few_as_possible(tile: tuple[int, int, int], block: int):
    def count(piece: tuple[int, ...]) -> int:
        return math.prod(-(-t // p) for t, p in zip(tile, piece, strict=True))

    chosen = pieces(tile, block)
    assert math.prod(chosen) <= block
    every = itertools.product(*(range(1, t + 1) for t in tile))
    assert count(chosen) == min(count(p) for p in every if math.prod(p) <= block)
    if math.prod(tile) <= block:
        assert chosen == tile


@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 4)] * 3))
def test_the_order_is_that_of_tiles(shape: tuple[int, int, int], tile: tuple[int, int, int]):
    grid = TokenGrid(*shape)
    axes = tuple(whole(extent).intervals() for extent in shape)
    tiling = tile_grid(axes, tile, 128, CPU)
    assert torch.equal(tiling.order(grid).index, orders.tile(grid, tile).index)
    assert tiling.sizes.tolist() == orders.tile_runs(grid, tile)


@given(st.data())
def test_visits_pair_by_pair(data: st.DataObject):
    reaches, tables = [], []
    for _ in range(3):
        extent = data.draw(st.integers(1, 9))
        window = data.draw(st.integers(1, extent))
        axis = Neighbourhood(extent, window, data.draw(st.integers(1, window)))
        cut = cuts([extent], data.draw(st.integers(1, 4)), 4)
        reaches.append(Reach.of(axis.intervals(), torch.tensor(cut)))
        mask = axis.intervals().mask()
        ends = list(itertools.pairwise(cut))
        tables.append([[mask[a:b, c:d] for c, d in ends] for a, b in ends])
    visits = Visits.of(reaches, CPU)
    found = {
        (int(r), int(k)): bool(f)
        for r, k, f in zip(visits.row, visits.key, visits.full, strict=True)
    }
    sizes = [len(table) for table in tables]
    expected = {}
    for (row, q), (key, k) in itertools.product(
        enumerate(itertools.product(*map(range, sizes))), repeat=2
    ):
        parts = [table[a][b] for table, a, b in zip(tables, q, k, strict=True)]
        if all(part.any() for part in parts):
            expected[row, key] = all(bool(part.all()) for part in parts)
    assert found == expected
    assert list(found) == sorted(found)


def test_heads_of_several_dilations_or_shifts_are_refused():
    layout = TokenLayout((TokenGrid(1, 1, 8),))
    plain = (whole(1), whole(1), Neighbourhood(8, 2))
    for other in (Neighbourhood(8, 2, dilation=2), Rolled(Neighbourhood(8, 4, 4), 2)):
        with pytest.raises(ValueError, match="one dilation and one shift in all heads"):
            plan_windows(layout, [plain, (whole(1), whole(1), other)], (1, 1, 4), 64, CPU)


def test_too_many_entries():
    check_entries(2**31 - 1)
    with pytest.raises(ValueError, match=r"at most 2\*\*31 - 1 entries in a plan, got 2147483648"):
        check_entries(2**31)


def test_a_grid_beyond_31_bits():
    axes = tuple(Neighbourhood(n, 3) for n in (2**9, 2**10, 2**10))
    layout = TokenLayout((TokenGrid(2**9, 2**10, 2**10),))
    with pytest.raises(ValueError, match="whose coordinates fit 31 bits"):
        plan_windows(layout, [axes], (8, 4, 4), 128, torch.device("meta"))
