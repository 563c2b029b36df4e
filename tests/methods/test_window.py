"""Windows against their definition, written out one token at a time."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse import tiling
from dit_sparse.block_times import Work
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.mask_product import COLUMNS
from dit_sparse.method import CallContext
from dit_sparse.methods.window import WindowMethod
from dit_sparse.plan import BlockPlan
from tests.methods.layouts import layouts, plan_on
from tests.window_oracle import axis_keys, product_reads, sequence_mask

AXES = ("frames", "height", "width")
REAL_GRIDS = ["21x45x80", "33x45x80", "21x30x52", "13x30x45", "64x64", "83x83", "30x48x80"]


def reached(rows: list[set[int]], start: int) -> set[int]:
    """The positions whose contents get to `start` through any number of layers."""
    found, new = {start}, {start}
    while new:
        new = set().union(*(rows[position] for position in new)) - found
        found |= new
    return found


class TestDefinition:
    @pytest.mark.parametrize("axis", range(3))
    @pytest.mark.parametrize(
        ("extent", "window", "stride", "table"),
        [
            (7, 3, 1, "012 012 123 234 345 456 456"),
            (7, 4, 1, "0123 0123 0123 1234 2345 3456 3456"),
            (8, 4, 2, "0123 0123 1234 1234 3456 3456 4567 4567"),
            (7, 4, 3, "0123 0123 0123 2345 2345 2345 3456"),
            (8, 4, 4, "0123 0123 0123 0123 4567 4567 4567 4567"),
        ],
    )
    def test_tables(self, axis: int, extent: int, window: int, stride: int, table: str):
        def along(n: int) -> tuple[int, int, int]:
            values = [1, 1, 1]
            values[axis] = n
            return values[0], values[1], values[2]

        method = WindowMethod(window=along(window), stride=along(stride))
        mask = plan_on(method, TokenGrid(*along(extent))).to_mask()[0, 0]
        rows = ["".join(str(k) for k in row.nonzero().flatten().tolist()) for row in mask]
        assert " ".join(rows) == table

    @settings(max_examples=80)
    @given(st.data())
    def test_random_windows(self, data: st.DataObject):
        shape = data.draw(st.tuples(*[st.integers(1, 6)] * 3).filter(lambda s: math.prod(s) <= 60))
        window = tuple(data.draw(st.integers(1, extent)) for extent in shape)
        stride = tuple(data.draw(st.integers(1, w)) for w in window)
        tile = data.draw(st.none() | st.tuples(*[st.integers(1, extent) for extent in shape]))
        layout = data.draw(layouts(TokenGrid(*shape)))
        block = data.draw(st.sampled_from([64, 128]))
        method = WindowMethod(window=window, stride=stride, tile=tile, block=block)
        plan = plan_on(method, layout)
        axes = [axis_keys(*axis) for axis in zip(shape, window, stride, strict=True)]
        assert torch.equal(plan.to_mask()[:, 0], sequence_mask(layout, product_reads(axes)))

    @pytest.mark.parametrize("shape", [(5, 12, 14), (1, 33, 31), (9, 8, 8)])
    @pytest.mark.parametrize(("share", "stride"), [(0.3, 1), (0.5, 2), (0.6, 3)])
    def test_grids_of_many_blocks(self, shape: tuple[int, int, int], share: float, stride: int):
        """Several blocks per axis: whole, masked and skipped ones occur."""
        grid = TokenGrid(*shape)
        window = tuple(max(1, round(share * extent)) for extent in shape)
        strides = tuple(min(stride, w) for w in window)
        plan = plan_on(WindowMethod(window=window, stride=strides, block=64), grid)
        assert not bool(plan.visited.all())
        assert plan.box is not None
        mask = plan.to_mask()[0, 0]
        axes = [axis_keys(*a) for a in zip(shape, window, strides, strict=True)]
        tables = [torch.tensor([[b in row for b in range(len(t))] for row in t]) for t in axes]
        a, b, c = tables
        n = grid.length
        expected = torch.einsum("ab,cd,ef->acebdf", a.int(), b.int(), c.int()).reshape(n, n).bool()
        assert torch.equal(mask, expected)

    def test_every_query_reads_as_many_keys(self):
        """Windows are pushed inwards at the borders, never cut."""
        mask = plan_on(WindowMethod(window=(2, 3, 4)), TokenGrid(4, 6, 7)).to_mask()
        assert mask.sum(-1).unique().tolist() == [24]

    @pytest.mark.parametrize("window", [(4, 6, 7), (1.0, 1.0, 1.0)])
    @pytest.mark.parametrize("stride", [None, 1, 2])
    def test_a_window_of_the_grid_is_dense(self, window: tuple[float, ...], stride: int | None):
        plan = plan_on(WindowMethod(window=window, stride=stride), TokenGrid(4, 6, 7))
        assert bool(plan.to_mask().all())
        assert plan.box is None, "nothing needs a mask"

    def test_shares_of_an_axis(self):
        method = WindowMethod(window=(1.0, 0.5, 0.01), stride=1)
        assert method.shape_on(TokenGrid(3, 9, 8)).window == (3, 4, 1)

    def test_one_stride_for_all_axes(self):
        shape = WindowMethod(window=(4, 4, 8), stride=4).shape_on(TokenGrid(5, 9, 9))
        assert shape.stride == (4, 4, 4)
        shape = WindowMethod(window=(4, 8), stride=4).shape_on(TokenGrid(1, 9, 9))
        assert shape.stride == (1, 4, 4), "an axis of one token has no other stride"

    def test_images_take_two_numbers(self):
        grid = TokenGrid(1, 9, 8)
        two = plan_on(WindowMethod(window=(3, 5), stride=(1, 2), tile=(3, 4)), grid)
        three = plan_on(WindowMethod(window=(1, 3, 5), stride=(1, 1, 2), tile=(1, 3, 4)), grid)
        assert torch.equal(two.to_mask(), three.to_mask())
        assert str(two) == str(three)

    def test_strided_by_its_tile_a_window_of_odd_tiles_masks_nothing(self):
        """Sliding tile attention (arXiv 2502.04507)."""
        method = WindowMethod(window=(3, 6, 12), stride=(1, 2, 4), tile=(1, 2, 4))
        plan = plan_on(method, TokenGrid(4, 8, 16))
        assert plan.box is None
        assert not plan.partial.any()
        assert plan.density == pytest.approx(3 * 6 * 12 / (4 * 8 * 16))


def test_plans_are_made_on_the_device_of_the_queries():
    q = torch.empty(1, 1, 1, 1, device="meta")
    method = WindowMethod(window=(2, 3))
    plan = method.plan(q, q, CallContext(TokenLayout.of(TokenGrid(1, 6, 6), 2)))
    assert plan.device.type == "meta"
    assert plan.box is not None
    assert plan.box.lower.device.type == plan.q_blocks.starts.device.type == "meta"
    assert plan.order is not None
    assert plan.order.index.device.type == "meta"


class TestDensity:
    @pytest.mark.parametrize("name", REAL_GRIDS)
    @pytest.mark.parametrize("block", [64, 128])
    def test_comes_near_what_was_asked(self, name: str, block: int):
        for density in (0.1, 0.2, 0.3, 0.5):
            plan = plan_on(WindowMethod(density=density, block=block), TokenGrid.parse(name))
            assert plan.density == pytest.approx(density, rel=0.15)

    @pytest.mark.parametrize("name", ["5x9x13", "12x11"])
    @pytest.mark.parametrize("block", [64, 128])
    def test_one_reads_everything(self, name: str, block: int):
        plan = plan_on(WindowMethod(density=1.0, block=block), TokenGrid.parse(name))
        assert bool(plan.to_mask().all())
        assert plan.density == 1.0
        assert plan.box is None

    def test_is_the_default(self):
        grid = TokenGrid(13, 30, 45)
        assert WindowMethod().shape_on(grid) == WindowMethod(density=0.3).shape_on(grid)

    def test_windows_are_whole_tiles_or_the_whole_axis(self):
        """An odd number strided by one tile, or an even number strided by two."""
        strides = set()
        for grid in (TokenGrid(21, 30, 52), TokenGrid(21, 45, 80)):
            for density in (0.05, 0.1, 0.3, 0.6):
                shape = WindowMethod(density=density).shape_on(grid)
                assert math.prod(shape.tile) <= 128
                for window, stride, tile, extent in zip(
                    shape.window, shape.stride, shape.tile, grid.shape, strict=True
                ):
                    if window < extent:
                        assert (window % tile, stride) == (0, tile * (2 - window // tile % 2))
                        strides.add(stride // tile)
        assert strides == {1, 2}

    @pytest.mark.parametrize(("density", "most"), [(0.2, 50), (0.1, 25)])
    def test_images_of_powers_of_two_have_no_masked_blocks(self, density: float, most: float):
        """At 0.1 tiles of 7x16 tokens, short and masked ones among them, took as long as 0.2."""
        plan = plan_on(WindowMethod(density=density), TokenGrid(1, 128, 128))
        assert (plan.box, plan.k_blocks.ragged) == (None, False)
        assert _time(plan) / 132 < most

    @pytest.mark.parametrize("name", [*REAL_GRIDS, "5x9x13", "12x11", "1x37", "3x3x200", "2x4x4"])
    @pytest.mark.parametrize("block", [64, 128])
    def test_no_part_of_the_grid_is_cut_off(self, name: str, block: int):
        """From either end of an axis, reading what is read leads to the other end."""
        grid = TokenGrid.parse(name)
        for density in (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9):
            shape = WindowMethod(density=density, block=block).shape_on(grid)
            for axis in zip(grid.shape, shape.window, shape.stride, strict=True):
                rows = axis_keys(*axis)
                for end in (0, len(rows) - 1):
                    assert reached(rows, end) == set(range(len(rows))), (density, shape)

    def test_a_density_of_a_given_tile_is_connected(self):
        shape = WindowMethod(density=0.05, tile=(3, 10, 13)).shape_on(TokenGrid(21, 30, 52))
        assert shape.window == (9, 30, 39), "three tiles, or all of an axis of three"

    @pytest.mark.parametrize("name", [*REAL_GRIDS, "128x128"])
    def test_windows_are_even_and_of_whole_blocks(self, name: str):
        """Only bands of rows meet some densities with three blocks of 128 tokens per axis."""
        grid = TokenGrid.parse(name)
        bands = {("64x64", 0.1), ("83x83", 0.1), ("83x83", 0.2)}
        for density in (0.1, 0.2, 0.3, 0.5):
            plan = plan_on(WindowMethod(density=density), grid)
            assert int(plan.partial.sum()) <= 0.16 * int(plan.visited.sum())
            window = WindowMethod(density=density).shape_on(grid).window
            cut = [w / n for w, n in zip(window, grid.shape, strict=True) if n > 1]
            if (name, density) not in bands:
                assert min(cut) > density ** (1 / len(cut)) / 2.2, (density, window)

    @pytest.mark.parametrize("name", [*REAL_GRIDS, "128x128"])
    def test_the_search_is_quick(self, name: str):
        for density in (0.02, 0.1, 0.2, 0.3, 0.5):
            began = time.process_time()
            tiling.window_for_density.__wrapped__(TokenGrid.parse(name), density, 128)
            assert time.process_time() - began < 1.5, "0.05 s on an idle machine"

    def test_a_tile_and_a_stride_may_be_given(self):
        method = WindowMethod(density=0.3, tile=(3, 4, 8), stride=1)
        shape = method.shape_on(TokenGrid(21, 30, 52))
        assert shape.tile == (3, 4, 8)
        assert shape.stride == (1, 1, 1)


class TestTile:
    @pytest.mark.parametrize("shape", [(4, 6, 8), (1, 16, 13), (7, 5, 9)])
    @pytest.mark.parametrize(("share", "stride"), [(0.3, 1), (0.5, 2), (0.9, 1), (0.9, 3)])
    def test_no_other_tile_takes_less_time(
        self, shape: tuple[int, int, int], share: float, stride: int
    ):
        """The cost of every tile that fits, from the entries of its plan."""
        grid = TokenGrid(*shape)
        window = tuple(max(1, round(share * extent)) for extent in shape)
        chosen = WindowMethod(window=window, stride=stride, block=64).shape_on(grid).tile
        assert math.prod(chosen) <= 64
        costs = {}
        for tile in itertools.product(*(range(1, extent + 1) for extent in shape)):
            if math.prod(tile) <= 64:
                method = WindowMethod(window=window, stride=stride, tile=tile, block=64)
                costs[tile] = _time(plan_on(method, grid))
        assert costs[chosen] == pytest.approx(min(costs.values()))

    @pytest.mark.parametrize("name", REAL_GRIDS)
    def test_beats_tiles_of_one_shape_for_all(self, name: str):
        grid = TokenGrid.parse(name)
        window = tuple(max(1, extent // 2) for extent in grid.shape)
        best = _time(plan_on(WindowMethod(window=window), grid))
        for tile in ((1, 1, 128), (1, 8, 16), (2, 8, 8), (4, 4, 8)):
            tile = tuple(min(t, extent) for t, extent in zip(tile, grid.shape, strict=True))
            assert best <= _time(plan_on(WindowMethod(window=window, tile=tile), grid)) + 1e-9


def _time(plan: BlockPlan) -> float:
    work = Work(
        rows=plan.q_blocks.n,
        full=int(plan.full.sum()),
        partial=int(plan.partial.sum()),
        masked_rows=int((plan.partial > 0).sum()),
        whole=not plan.q_blocks.ragged,
        classes=COLUMNS if plan.mask_product is None else 0,
    )
    return work.time


class TestRefusals:
    @pytest.mark.parametrize("axis", range(3))
    @pytest.mark.parametrize("name", ["window", "stride", "tile"])
    @pytest.mark.parametrize("wrong", [0, -1, 0.0, 1.5, float("nan"), "a", True, None])
    def test_the_sentence_names_the_axis(self, axis: int, name: str, wrong: object):
        options = {name: tuple(wrong if a == axis else 2 for a in range(3))}
        with pytest.raises(ValueError, match=rf"{name} along {AXES[axis]} .* got {wrong!r}\."):
            WindowMethod(**options)

    @pytest.mark.parametrize("name", ["window", "stride", "tile"])
    def test_two_numbers_are_height_and_width(self, name: str):
        with pytest.raises(ValueError, match=f"{name} along height .* got 0"):
            WindowMethod(**{name: (0, 1)})

    @pytest.mark.parametrize("axis", range(3))
    @pytest.mark.parametrize("name", ["window", "stride", "tile"])
    def test_too_large_for_the_grid(self, axis: int, name: str):
        options = {"window": (3, 4, 5)} | {name: tuple(99 if a == axis else 2 for a in range(3))}
        method = WindowMethod(**options)
        with pytest.raises(ValueError, match=rf"{name} along {AXES[axis]} .* got 99 on .*"):
            method.shape_on(TokenGrid(6, 7, 8))

    @pytest.mark.parametrize("options", [{"window": (3, 4, 5)}, {"density": 0.3}])
    def test_one_stride_larger_than_a_window(self, options: dict[str, object]):
        with pytest.raises(ValueError, match=r"stride along frames between 1 and .* got 1000 on"):
            WindowMethod(stride=1000, **options).shape_on(TokenGrid(6, 7, 8))
        with pytest.raises(ValueError, match=r"stride along height .* got 5 on"):
            WindowMethod(window=(4, 6), stride=5).shape_on(TokenGrid(1, 7, 8))

    def test_two_numbers_for_a_video(self):
        with pytest.raises(ValueError, match=r"window as \(frames, height, width\) for the grid"):
            plan_on(WindowMethod(window=(3, 3)), TokenGrid(2, 6, 6))

    @pytest.mark.parametrize("name", ["window", "stride", "tile"])
    def test_lists_become_tuples(self, name: str):
        listed, tupled = WindowMethod(**{name: [2, 3]}), WindowMethod(**{name: (2, 3)})
        assert listed == tupled
        assert hash(listed) == hash(tupled)

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"window": (3, 3), "density": 0.5}, "a window or a density, got both"),
            ({"density": 0.0}, "density above 0 and at most 1, got 0.0"),
            ({"density": 1.01}, "got 1.01"),
            ({"density": float("nan")}, "got nan"),
            ({"density": "0.3"}, "density above 0 and at most 1, got '0.3'"),
            ({"density": True}, "got True"),
            ({"stride": 0}, "stride of at least 1 along frames, height and width, .* got 0"),
            ({"stride": 2.5}, "stride of at least 1 along frames, height and width, .* got 2.5"),
            ({"stride": float("nan")}, "got nan"),
            ({"stride": True}, "got True"),
            ({"stride": "2"}, "got '2'"),
            ({"block": 96}, "block of 64 or 128 tokens, got 96"),
            ({"block": 128.0}, "block of 64 or 128 tokens, got 128.0"),
            ({"block": "128"}, "got '128'"),
            ({"window": 0}, "window of at least 1 along frames, height and width, .* got 0"),
            ({"window": 0.5}, "Expected a window of at least 1 along .* got 0.5"),
            ({"window": "345"}, "Expected window as .* got '345'"),
            ({"window": (1, 2, 3, 4)}, r"Expected window as .* got \(1, 2, 3, 4\)\. Give"),
            ({"window": ((3, 3), 4)}, "Expected window as .* got 4"),
            ({"window": ((3, 3), (0, 3))}, "window along height .* got 0"),
            ({"window": "car"}, "Expected window as .* got 'car'"),
            ({"dilation": 2}, "Expected a window for dilation, causality"),
            ({"causal": True, "density": 0.3}, "Expected a window for dilation, causality"),
            ({"borders": "truncated"}, "Expected a window for dilation, causality"),
            (
                {"window": 3, "dilation": 0},
                "dilation of at least 1 along frames, height and width, .* got 0",
            ),
            ({"window": 3, "dilation": (1, 0)}, "dilation along width .* got 0"),
            ({"window": 3, "causal": (True, 1)}, r"causal as true or false, .* got \(True, 1\)"),
            ({"window": 3, "causal": None}, "causal as true or false, .* got None"),
            ({"window": 3, "borders": "wrap"}, "borders among inward, truncated, got 'wrap'"),
            ({"window": ()}, r"Expected window as .* got \(\)"),
            ({"tile": 4}, "Expected tile as .* got 4"),
            ({"tile": (1, 2, 3, 4)}, "Expected tile as"),
            ({"stride": (1, 2, 3, 4)}, "Expected stride as"),
        ],
    )
    def test_options(self, options: dict[str, object], sentence: str):
        with pytest.raises(ValueError, match=sentence):
            WindowMethod(**options)

    def test_a_density_of_one_may_be_an_integer(self):
        assert WindowMethod(density=1) == WindowMethod(density=1.0)
