"""All options of windows at once, against attention written out from the definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.attention import attend
from dit_sparse.grid import TextSpan, TokenGrid, TokenLayout
from dit_sparse.methods.window import WindowMethod
from dit_sparse.plan_check import check_for
from tests.methods.layouts import grids, layouts, plan_on
from tests.window_oracle import attention, axis_keys, product_reads, sequence_mask


@st.composite
def windows(draw: st.DrawFn, grid: TokenGrid, heads: int | None = None) -> WindowMethod:
    """A method with random options that fit a grid."""
    dilation = tuple(draw(st.integers(1, n)) for n in grid.shape)
    one = st.tuples(*(st.integers(1, n // d) for n, d in zip(grid.shape, dilation, strict=True)))
    window = draw(one) if heads is None else tuple(draw(one) for _ in range(heads))
    smallest = window if heads is None else [min(along) for along in zip(*window, strict=True)]
    return WindowMethod(
        window=window,
        stride=tuple(draw(st.integers(1, w)) for w in smallest),
        dilation=dilation,
        causal=tuple(draw(st.booleans()) for _ in range(3)),
        borders=draw(st.sampled_from(["inward", "truncated"])),
        tile=draw(st.none() | st.tuples(*(st.integers(1, n) for n in grid.shape))),
        block=draw(st.sampled_from([64, 128])),
    )


def expected(method: WindowMethod, layout: TokenLayout) -> torch.Tensor:
    """bool `[batch, heads, N, N]` by the text."""
    nested = isinstance(method.window[0], tuple)
    masks = []
    for window in method.window if nested else (method.window,):
        axes = [
            axis_keys(*numbers, method.borders == "truncated")
            for numbers in zip(
                layout.grid.shape,
                window,
                method.stride,
                method.dilation,
                method.causal,
                strict=True,
            )
        ]
        masks.append(sequence_mask(layout, product_reads(axes)))
    return torch.stack(masks, dim=1)


@settings(max_examples=150)
@given(st.data())
def test_masks(data: st.DataObject):
    layout = data.draw(layouts(data.draw(grids())))
    method = data.draw(windows(layout.grid))
    assert torch.equal(plan_on(method, layout).to_mask(), expected(method, layout))


@settings(max_examples=50)
@given(st.data())
def test_a_window_for_each_head(data: st.DataObject):
    layout = data.draw(layouts(data.draw(grids(most=40))))
    method = data.draw(windows(layout.grid, heads=3))
    mask = plan_on(method, layout).to_mask()
    assert torch.equal(mask.expand(-1, 3, -1, -1), expected(method, layout))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_outputs_and_log_sum_exp(data: st.DataObject):
    """Grouped heads, values of another width, text: against loops in float64."""
    layout = data.draw(layouts(data.draw(grids(most=18))))
    method = data.draw(windows(layout.grid, heads=data.draw(st.sampled_from([None, 4]))))
    batch, generator = layout.batch or 1, torch.Generator().manual_seed(1)
    key_heads = data.draw(st.sampled_from([1, 2, 4]))
    shapes = ((4, 8), (key_heads, 8), (key_heads, 5))
    q, k, v = (torch.randn(batch, h, layout.length, d, generator=generator) for h, d in shapes)
    plan = plan_on(method, layout)
    scale = data.draw(st.sampled_from([None, 0.7]))
    out, lse = attend(q, k, v, plan, scale=scale, backend="reference")
    want, want_lse = attention(q, k, v, expected(method, layout), scale or 8**-0.5)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4, 12, 14), {"window": (2, 5, 4), "dilation": (2, 2, 3)}),
        ((1, 44, 40), {"window": (1, 4, 16), "dilation": (1, 11, 2)}),
        ((1, 49, 8), {"window": (1, 17, 8), "dilation": (1, 2, 1), "tile": (1, 8, 8)}),
        ((9, 9, 9), {"window": 3, "causal": (True, False, False)}),
        ((5, 13, 11), {"window": 5, "stride": (1, 3, 4), "borders": "truncated"}),
    ],
)
def test_grids_of_many_blocks(shape: tuple[int, int, int], options: dict[str, object]):
    """The third: groups of 25 and of 24 rows, whose windows at the far border differ."""
    method = WindowMethod(block=64, **options)
    plan = plan_on(method, TokenGrid(*shape))
    assert plan.q_blocks.n > 4
    assert plan.box is not None
    spread = {"stride": 1, "dilation": 1, "causal": False} | options
    per_axis = {
        name: value if isinstance(value, tuple) else (value,) * 3 for name, value in spread.items()
    }
    numbers = (per_axis[name] for name in ("window", "stride", "dilation", "causal"))
    tables = []
    for axis in zip(shape, *numbers, strict=True):
        rows = axis_keys(*axis, options.get("borders") == "truncated")
        tables.append(torch.tensor([[j in row for j in range(len(rows))] for row in rows]).int())
    size = len(plan.order.index)
    product = torch.einsum("ab,cd,ef->acebdf", *tables).reshape(size, size).bool()
    assert torch.equal(plan.to_mask()[0, 0], product)


class TestLists:
    def test_full_tiles_are_told_one_by_one(self):
        """A stride of 1 masks the tiles at a window's edge, and no others."""
        plan = plan_on(WindowMethod(window=(40, 40), tile=(8, 16)), TokenGrid(1, 96, 96))
        full, partial = int(plan.full.sum()), int(plan.partial.sum())
        rows = axis_keys(96, 40)
        table = torch.tensor([[j in row for j in range(96)] for row in rows])
        mask = (table[:, None, :, None] & table[None, :, None, :]).view(9216, 9216)
        mask = mask[plan.order.index][:, plan.order.index]
        tiles = mask.view(72, 128, 72, 128)
        assert full == int(tiles.all(-1).all(1).sum())
        assert full + partial == int(tiles.any(-1).any(1).sum())
        assert full > 300
        assert partial > 300

    @pytest.mark.parametrize("stride", [1, 3])
    def test_no_tile_is_visited_in_vain(self, stride: int):
        method = WindowMethod(window=(9, 15), stride=stride, dilation=(3, 2), tile=(4, 6))
        plan = plan_on(method, TokenGrid(1, 31, 45))
        mask = plan.to_mask()[0, 0][plan.order.index][:, plan.order.index]
        seen = torch.zeros(plan.q_blocks.n, plan.k_blocks.n, dtype=torch.bool)
        of = plan.q_blocks.of_token
        q, k = mask.nonzero().unbind(-1)
        seen[of[q], of[k]] = True
        assert torch.equal(plan.visited[0, 0], seen)

    def test_heads_with_equal_windows_share_their_lists(self):
        wide, narrow = (5, 20, 20), (1, 20, 20)
        grid = TokenGrid(5, 20, 20)
        mixed = plan_on(WindowMethod(window=(wide, narrow, wide, narrow)), grid)
        alone = [plan_on(WindowMethod(window=w, tile=(1, 4, 20)), grid) for w in (wide, narrow)]
        assert mixed.offsets.shape[1] == 4
        assert torch.equal(mixed.offsets[0, 0], mixed.offsets[0, 2])
        assert torch.equal(mixed.offsets[0, 1], mixed.offsets[0, 3])
        same = plan_on(WindowMethod(window=(wide, wide)), grid)
        assert same.offsets.shape[1] == 1
        assert alone[0].density > mixed.density > alone[1].density

    def test_a_plan_for_other_heads_is_refused(self):
        grid = TokenGrid(1, 6, 6)
        plan = plan_on(WindowMethod(window=((3, 3), (5, 3))), grid)
        q = torch.zeros(1, 3, grid.length, 8)
        with pytest.raises(ValueError, match="Expected 2 heads, as the plan has, got 3"):
            check_for(plan, q, q)

    def test_a_large_grid_needs_little_memory(self):
        """11,250 blocks: lists are written as they are, no matrix of blocks is."""
        layout = TokenLayout.of(TokenGrid(60, 120, 200), 0, 512)
        plan = plan_on(WindowMethod(window=(3, 9, 9), tile=(4, 4, 8)), layout)
        assert plan.q_blocks.n == 11_254
        assert plan.indices.numel() < 600_000

    def test_larger_tiles_are_cut_into_blocks(self):
        plan = plan_on(WindowMethod(window=(6, 24, 24), tile=(6, 8, 8)), TokenGrid(12, 32, 32))
        assert plan.q_blocks.lengths.unique().tolist() == [128]


class TestOptions:
    def test_one_number_for_all_axes(self):
        grid = TokenGrid(1, 9, 8)
        assert WindowMethod(window=3).shape_on(grid).window == (1, 3, 3)
        three = WindowMethod(window=(1, 3, 3), dilation=(1, 2, 2), causal=(False, True, True))
        one = WindowMethod(window=3, dilation=2, causal=(True, True))
        assert torch.equal(plan_on(one, grid).to_mask(), plan_on(three, grid).to_mask())

    def test_a_sequence_takes_one_number(self):
        plan = plan_on(WindowMethod(window=(3,)), TokenGrid(1, 1, 7))
        rows = plan.to_mask()[0, 0].int().argmax(-1)
        assert rows.tolist() == [0, 0, 1, 2, 3, 4, 4]

    def test_auto_is_a_density(self):
        assert WindowMethod(window="auto") == WindowMethod()
        assert WindowMethod(window="auto", density=0.2) == WindowMethod(density=0.2)

    def test_shares_of_a_dilated_axis(self):
        method = WindowMethod(window=(1.0, 0.5, 1.0), dilation=(2, 2, 3))
        assert method.shape_on(TokenGrid(7, 12, 8)).window == (3, 3, 2)

    def test_lists_become_tuples(self):
        listed = WindowMethod(window=[[3, 3], [5, 5]], dilation=[1, 1], causal=[True, False])
        tupled = WindowMethod(window=((3, 3), (5, 5)), dilation=(1, 1), causal=(True, False))
        assert listed == tupled
        assert hash(listed) == hash(tupled)

    @pytest.mark.parametrize("axis", range(3))
    def test_a_window_beyond_its_dilated_axis(self, axis: int):
        name = ("frames", "height", "width")[axis]
        window = tuple(4 if a == axis else 1 for a in range(3))
        with pytest.raises(ValueError, match=f"window along {name} between 1 and 3 .* dilation"):
            plan_on(WindowMethod(window=window, dilation=2), TokenGrid(7, 7, 7))

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"dilation": (1, 9, 1)}, "dilation along height between 1 and 8 tokens, got 9"),
            ({"dilation": (1, 2)}, r"dilation as \(frames, .* got \(1, 2\)"),
            ({"causal": (True, False)}, r"causal as \(frames, .* got \(True, False\)"),
            ({"stride": (1, 3, 1)}, "stride along height between 1 and 2 tokens, got 3"),
        ],
    )
    def test_refusals_name_the_axis(self, options: dict[str, object], sentence: str):
        with pytest.raises(ValueError, match=sentence):
            plan_on(WindowMethod(window=(1, 2, 1), **options), TokenGrid(2, 8, 8))


class TestIdentities:
    @pytest.mark.parametrize("causal", [False, True])
    def test_a_window_of_every_axis(self, causal: bool):
        """Dense, and under causality the lower triangle of every axis."""
        grid = TokenGrid(3, 4, 5)
        mask = plan_on(WindowMethod(window=(3, 4, 5), causal=causal), grid).to_mask()[0, 0]
        at = grid.coordinates()
        later = (at[None] <= at[:, None]).all(-1)
        assert torch.equal(mask, later if causal else torch.ones_like(later))

    def test_stride_of_the_window_is_blocked_attention(self):
        plan = plan_on(WindowMethod(window=(2, 4), stride=(2, 4)), TokenGrid(1, 6, 12))
        at = TokenGrid(1, 6, 12).coordinates()
        block = at // torch.tensor([1, 2, 4])
        assert torch.equal(plan.to_mask()[0, 0], (block[None] == block[:, None]).all(-1))

    def test_dilation_splits_the_grid_into_independent_ones(self):
        mask = plan_on(WindowMethod(window=3, dilation=2), TokenGrid(1, 8, 8)).to_mask()[0, 0]
        mask = mask.view(8, 8, 8, 8)
        inner = plan_on(WindowMethod(window=3), TokenGrid(1, 4, 4)).to_mask().view(4, 4, 4, 4)
        for a, b in itertools.product(range(2), range(2)):
            assert torch.equal(mask[a::2, b::2, a::2, b::2], inner)
        assert int(mask.sum()) == 4 * int(inner.sum())

    def test_text_alone_separates_a_batch(self):
        layout = TokenLayout((TextSpan(3, (0, 3)), TokenGrid(1, 2, 2)))
        mask = plan_on(WindowMethod(window=1), layout).to_mask()[:, 0]
        assert mask[0, 3:, :3].sum() == 0
        assert bool(mask[1, :, :3].all())
        assert torch.equal(mask[0, 3:, 3:], torch.eye(4, dtype=torch.bool))


class TestCounts:
    """Visited blocks against counts that were made elsewhere, for models' grids."""

    FLUX, HUNYUAN, LONGER, WAN = "256x256", "30x48x80", "33x45x80", "21x45x80"

    @pytest.mark.parametrize(
        ("name", "window", "stride", "tile", "speedup", "full"),
        [
            (FLUX, (80, 80), (1, 1), (16, 8), 7.51, 0.50),
            (FLUX, (80, 80), (1, 1), (8, 8), 8.96, 0.76),
            (FLUX, (80, 80), (8, 8), (16, 8), 7.51, 0.50),
            (FLUX, (80, 80), (16, 8), (16, 8), 9.58, 0.87),
            (FLUX, (80, 80), (16, 16), (16, 8), 10.24, 1.0),
            (HUNYUAN, (18, 24, 24), (1, 1, 1), (2, 8, 8), 5.44, 0.17),
            (HUNYUAN, (18, 24, 24), (2, 8, 8), (2, 8, 8), 11.11, 1.0),
            (HUNYUAN, (18, 24, 24), (16, 8, 8), (2, 8, 8), 11.11, 1.0),
            (HUNYUAN, (18, 24, 24), (16, 8, 8), (4, 4, 8), 9.38, 0.80),
            (LONGER, (18, 24, 24), (1, 1, 1), (2, 8, 8), 4.76, 0.0),
            (LONGER, (18, 24, 24), (2, 8, 8), (2, 8, 8), 9.10, 0.0),
            (LONGER, (18, 24, 24), (16, 8, 8), (2, 8, 8), 8.88, 0.0),
            (WAN, (21, 15, 24), (1, 1, 1), (4, 4, 8), 3.80, 0.19),
            (WAN, (21, 15, 24), (1, 1, 1), (2, 8, 8), 3.86, 0.12),
            (WAN, (21, 12, 24), (1, 4, 8), (4, 4, 8), 8.51, 0.75),
            (WAN, (21, 16, 24), (1, 8, 8), (2, 8, 8), 5.66, 0.37),
            (WAN, (9, 15, 24), (1, 1, 1), (2, 8, 8), 8.49, 0.09),
            (WAN, (9, 15, 24), (3, 5, 8), (3, 5, 8), 23.3, 1.0),
            (WAN, (15, 25, 40), (3, 5, 8), (3, 5, 8), 5.04, 1.0),
        ],
    )
    def test_dense_tiles_per_visited_one(
        self,
        name: str,
        window: tuple[int, ...],
        stride: tuple[int, ...],
        tile: tuple[int, ...],
        speedup: float,
        full: float,
    ):
        """Where tiles do not divide the grid the counts elsewhere pad them, and padding masks."""
        grid, tokens = TokenGrid.parse(name), math.prod(tile)
        block = 64 if tokens <= 64 else 128
        plan = plan_on(WindowMethod(window=window, stride=stride, tile=tile, block=block), grid)
        visited = int(plan.count.sum())
        assert math.ceil(grid.length / tokens) ** 2 / visited == pytest.approx(speedup, abs=0.05)
        got = int(plan.full.sum()) / visited
        divides = plan.q_blocks.n * tokens == grid.length
        assert got == pytest.approx(full, abs=0.006) or (not divides and got > full)

    def test_dilated_windows_of_whole_tiles(self):
        """Cosmos-Predict2's list has (16, 4, 16) with a dilation of (1, 11, 5) on 16x44x80."""
        method = WindowMethod(window=(16, 4, 16), dilation=(1, 11, 5), tile=(4, 4, 8))
        plan = plan_on(method, TokenGrid(16, 44, 80))
        assert plan.box is None
        assert 1 / plan.density == pytest.approx(55)
