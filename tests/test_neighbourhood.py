"""Windows along one axis: tables checked by eye, and the definitions word by word."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.neighbourhood import Axis, Neighbourhood, Partition, Rolled, SlidingTiles, Within
from tests.window_oracle import axis_keys

TABLES = [
    # extent, window, stride, dilation, causal, the keys of every position
    (7, 3, 1, 1, False, "012 012 123 234 345 456 456"),
    (7, 4, 1, 1, False, "0123 0123 0123 1234 2345 3456 3456"),
    (8, 4, 2, 1, False, "0123 0123 1234 1234 3456 3456 4567 4567"),
    (7, 4, 3, 1, False, "0123 0123 0123 2345 2345 2345 3456"),
    (8, 4, 4, 1, False, "0123 0123 0123 0123 4567 4567 4567 4567"),
    (9, 3, 1, 2, False, "024 135 024 135 246 357 468 357 468"),
    (7, 3, 1, 1, True, "0 01 012 123 234 345 456"),
    (8, 4, 3, 1, True, "0 01 012 23 234 2345 456 4567"),
    (7, 2, 2, 2, True, "0 1 02 13 4 35 46"),
]


def keys(axis: Axis) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in axis.intervals().mask()]


def table(rows: list[set[int]]) -> str:
    return " ".join("".join(map(str, sorted(row))) for row in rows)


@st.composite
def neighbourhoods(draw: st.DrawFn, extent: int | None = None) -> Neighbourhood:
    extent = draw(st.integers(1, 24)) if extent is None else extent
    dilation = draw(st.integers(1, extent))
    window = draw(st.integers(1, extent // dilation))
    return Neighbourhood(
        extent,
        window,
        draw(st.integers(1, window)),
        dilation,
        draw(st.booleans()),
        draw(st.sampled_from(["inward", "truncated"])),
    )


def by_the_text(axis: Neighbourhood) -> list[set[int]]:
    truncated = axis.borders == "truncated"
    return axis_keys(axis.extent, axis.window, axis.stride, axis.dilation, axis.causal, truncated)


class TestNeighbourhood:
    @pytest.mark.parametrize(("extent", "window", "stride", "dilation", "causal", "rows"), TABLES)
    def test_tables(
        self, extent: int, window: int, stride: int, dilation: int, causal: bool, rows: str
    ):
        assert table(keys(Neighbourhood(extent, window, stride, dilation, causal))) == rows

    @pytest.mark.parametrize(("extent", "window", "stride", "dilation", "causal", "rows"), TABLES)
    def test_the_yardstick_itself(
        self, extent: int, window: int, stride: int, dilation: int, causal: bool, rows: str
    ):
        assert table(axis_keys(extent, window, stride, dilation, causal)) == rows

    def test_truncated_tables(self):
        def rows(*numbers: int) -> str:
            return table(keys(Neighbourhood(*numbers, borders="truncated")))

        assert rows(6, 3) == "01 012 123 234 345 45"
        assert rows(6, 4) == "01 012 0123 1234 2345 345"
        assert rows(6, 4, 2) == "012 012 1234 1234 345 345"

    @given(neighbourhoods())
    def test_every_option_by_the_text(self, axis: Neighbourhood):
        assert keys(axis) == by_the_text(axis)

    @given(neighbourhoods())
    def test_ends_never_fall_and_runs_are_not_crossed(self, axis: Neighbourhood):
        intervals = axis.intervals()
        assert bool((intervals.low.diff() >= 0).all())
        assert bool((intervals.high.diff() >= 0).all())
        assert bool((intervals.low <= intervals.high).all())
        assert sorted(intervals.position.tolist()) == list(range(axis.extent))
        assert sum(intervals.runs) == axis.extent
        run = torch.arange(len(intervals.runs)).repeat_interleave(torch.tensor(intervals.runs))
        assert torch.equal(run[intervals.low], run[intervals.high])

    @given(st.integers(1, 24), st.data())
    def test_windows_are_whole_unless_truncated_or_causal(self, extent: int, data: st.DataObject):
        axis = data.draw(neighbourhoods(extent).filter(lambda a: not a.causal))
        sizes = set(map(len, keys(axis)))
        assert sizes == {axis.window} or axis.borders == "truncated"

    def test_a_window_of_the_axis_is_everything(self):
        for borders in ("inward", "truncated"):
            seen = Neighbourhood(7, 7, 7, borders=borders).intervals().mask()
            assert bool(seen.all()) or borders == "truncated"
        assert bool(Neighbourhood(7, 7, 3).intervals().mask().all())

    def test_groups_of_unequal_length_have_windows_of_their_own(self):
        """The right border of a shorter group is not that of the first."""
        rows = keys(Neighbourhood(7, 3, 1, 2))
        assert rows[6] == {2, 4, 6}
        assert rows[5] == rows[1] == {1, 3, 5}

    @pytest.mark.parametrize(
        ("numbers", "sentence"),
        [
            ((0, 1), "an extent along its axis of at least 1"),
            ((4, 0), "a window along its axis of at least 1, an integer, got 0"),
            ((4, 2, 0), "a stride along its axis of at least 1"),
            ((4, 2, 1, 0), "a dilation along its axis of at least 1"),
            ((7, 4, 1, 2), r"window \* dilation along its axis of at most 7, .* got 4 \* 2"),
            ((7, 4, 5), "stride along its axis of at most 4, its window, got 5"),
            ((7, 4, 1, 1, False, "wrap"), "borders among inward, truncated, got 'wrap'"),
        ],
    )
    def test_refuses(self, numbers: tuple, sentence: str):
        with pytest.raises(ValueError, match=sentence):
            Neighbourhood(*numbers)


@given(neighbourhoods(), st.integers(0, 40))
def test_rolled_is_roll_windows_roll_back(axis: Neighbourhood, shift: int):
    there = torch.arange(axis.extent).roll(-shift)  # the position that comes to each place
    expected: list[set[int]] = [set() for _ in range(axis.extent)]
    for place, row in enumerate(by_the_text(axis)):
        expected[int(there[place])] = {int(there[key]) for key in row}
    assert keys(Rolled(axis, shift)) == expected


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 20))
def test_partitions_are_windows_from_the_shift_on(extent: int, window: int, shift: int):
    for position, row in enumerate(keys(Partition(extent, window, shift))):
        same = {j for j in range(extent) if (j - shift) // window == (position - shift) // window}
        assert row == same


@given(st.integers(1, 24), st.integers(1, 8), st.integers(1, 9))
def test_sliding_tiles_by_the_text(extent: int, tile: int, count: int):
    tiles, r = -(-extent // tile), count // 2
    for position, row in enumerate(keys(SlidingTiles(extent, tile, count))):
        if 2 * r + 1 >= tiles:
            read = set(range(tiles))
        else:
            centre = min(max(position // tile, r), tiles - 1 - r)
            read = set(range(centre - r, centre + r + 1))
        assert row == {j for j in range(extent) if j // tile in read}


@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from([1, 3, 5]))
def test_sliding_tiles_that_divide_are_strided_windows(tiles: int, tile: int, count: int):
    extent = tiles * tile
    if count <= tiles:
        expected = axis_keys(extent, count * tile, tile)
        assert keys(SlidingTiles(extent, tile, count)) == expected


@given(st.integers(1, 20), st.integers(0, 22))
def test_within(extent: int, reach: int):
    for position, row in enumerate(keys(Within(extent, reach))):
        assert row == {j for j in range(extent) if abs(j - position) <= reach}


@given(st.integers(1, 40), st.integers(0, 25))
def test_freeswim_is_neighbourhood_attention(extent: int, half: int):
    """Its window by its own rule: pushed by what it overhangs at the other border."""
    for i, row in enumerate(keys(Neighbourhood(extent, min(2 * half + 1, extent)))):
        first = i - half - max(half + i - extent + 1, 0)
        last = i + half + max(half - i, 0)
        assert row == {j for j in range(extent) if first <= j <= last}
