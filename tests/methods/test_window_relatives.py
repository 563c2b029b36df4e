"""Methods that are windows of some kind: by their own definitions, and as each other."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.attention import attend, prepare
from dit_sparse.backend import AttentionOutput
from dit_sparse.coarse import in_plan_order, means
from dit_sparse.grid import TextSpan, TokenGrid, TokenLayout
from dit_sparse.methods.anchors import AnchorMethod
from dit_sparse.methods.disk import DiskMethod
from dit_sparse.methods.freeswim import FreeSwimMethod
from dit_sparse.methods.shifted import ShiftedMethod
from dit_sparse.methods.sta import SlidingTileMethod
from dit_sparse.methods.window import WindowMethod
from dit_sparse.plan_check import check
from dit_sparse.plan_io import save_plan
from tests.methods.layouts import grids, layouts, plan_on
from tests.oracle import masked_attention
from tests.window_oracle import Place, attention, axis_keys, product_reads, sequence_mask

IMAGE = TokenGrid(1, 12, 16)


class TestSlidingTiles:
    @settings(max_examples=60)
    @given(st.data())
    def test_masks(self, data: st.DataObject):
        layout = data.draw(layouts(data.draw(grids())))
        tile, count = (tuple(data.draw(st.integers(1, 5)) for _ in range(3)) for _ in "tc")
        mask = plan_on(SlidingTileMethod(window=count, tile=tile), layout).to_mask()[:, 0]
        axes = []
        for extent, edge, n in zip(layout.grid.shape, tile, count, strict=True):
            tiles, r = -(-extent // edge), n // 2
            rows = []
            for position in range(extent):
                centre = min(max(position // edge, r), max(r, tiles - 1 - r))
                read = range(centre - r, centre + r + 1)
                rows.append({j for j in range(extent) if j // edge in read})
            axes.append(rows)
        assert torch.equal(mask, sequence_mask(layout, product_reads(axes)))

    @pytest.mark.parametrize("count", [(1, 3, 1), (3, 1, 3), (3, 3, 3)])
    def test_odd_tiles_are_a_strided_window(self, count: tuple[int, int, int]):
        grid, tile = TokenGrid(6, 16, 24), (2, 4, 8)
        window = tuple(c * t for c, t in zip(count, tile, strict=True))
        sta = plan_on(SlidingTileMethod(window=count, tile=tile), grid)
        gna = plan_on(WindowMethod(window=window, stride=tile), grid)
        assert sta.box is None, "nothing is masked"
        assert torch.equal(sta.to_mask(), gna.to_mask())

    def test_even_counts_read_as_much_as_the_next_odd_one(self):
        grid = TokenGrid(12, 48, 80)
        even = plan_on(SlidingTileMethod(window=(2, 6, 10)), grid)
        assert even.density == 1.0
        two = plan_on(SlidingTileMethod(window=(1, 2, 4)), grid)
        three = plan_on(SlidingTileMethod(window=(1, 3, 5)), grid)
        assert two.density == three.density == pytest.approx(3 * 5 / (2 * 6 * 10))

    def test_windows_per_head(self):
        heads = ((1, 6, 10), (5, 1, 10), (5, 6, 1))
        grid = TokenGrid(10, 12, 20)
        plan = plan_on(SlidingTileMethod(window=heads, tile=(2, 2, 2)), grid)
        mask = plan.to_mask()
        for head, window in enumerate(heads):
            alone = plan_on(SlidingTileMethod(window=window, tile=(2, 2, 2)), grid)
            assert torch.equal(mask[:, head], alone.to_mask()[:, 0])

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"window": (3, 0, 3)}, "window along height of at least 1 tile, .* got 0"),
            ({"window": ((3, 3, 3), (3, 3, 0))}, "window along width of at least 1 tile"),
            ({"window": 3}, "Expected window as"),
            ({"window": (0.5, 1, 1)}, "window along frames .* got 0.5"),
            ({"tile": (6, 8, 0)}, "tile along width .* got 0"),
            ({"block": 32}, "block of 64 or 128"),
        ],
    )
    def test_refuses(self, options: dict[str, object], sentence: str):
        with pytest.raises(ValueError, match=sentence):
            SlidingTileMethod(**options)

    def test_refuses_another_rank(self):
        with pytest.raises(ValueError, match=r"window as \(frames, .* for the grid 2x8x8, got"):
            plan_on(SlidingTileMethod(window=(3, 3)), TokenGrid(2, 8, 8))


class TestFreeSwim:
    @settings(max_examples=40)
    @given(st.data())
    def test_masks(self, data: st.DataObject):
        """Its own rule: what overhangs one border is added at the other."""
        layout = data.draw(layouts(data.draw(grids())))
        base = tuple(data.draw(st.integers(1, 8)) for _ in range(2))
        if base == (1, 1):
            return
        mask = plan_on(FreeSwimMethod(base=base), layout).to_mask()[:, 0]

        def reads(q: Place, k: Place) -> bool:
            inside = True
            for axis, (extent, n) in enumerate(zip(layout.grid.shape[1:], base, strict=True)):
                i, j, d = q[axis + 1], k[axis + 1], n // 2
                first = i - d - max(d + i - extent + 1, 0)
                inside &= first <= j <= i + d + max(d - i, 0)
            return inside

        assert torch.equal(mask, sequence_mask(layout, reads))

    def test_is_neighbourhood_attention(self):
        grid = TokenGrid(3, 14, 17)
        free = plan_on(FreeSwimMethod(base=(6, 8)), grid)
        assert torch.equal(free.to_mask(), plan_on(WindowMethod(window=(3, 7, 9)), grid).to_mask())

    def test_the_scale(self):
        """Of 30x52: 1.0461 times the usual one, as its code has it."""
        plan = plan_on(FreeSwimMethod(), TokenGrid(1, 8, 8))
        assert plan.scale == pytest.approx(math.sqrt(math.log(3120) / math.log(1560)))
        assert plan.scale == pytest.approx(1.0461, abs=5e-5)
        assert plan_on(FreeSwimMethod(scaled=False), TokenGrid(1, 8, 8)).scale == 1.0

    def test_the_scale_reaches_outputs_and_log_sum_exp(self):
        layout = TokenLayout((TokenGrid(1, 4, 5), TextSpan(2)))
        plan = plan_on(FreeSwimMethod(base=(2, 2)), layout)
        q, k, v = (
            torch.randn(1, 2, 22, 8, generator=torch.Generator().manual_seed(i)) for i in (1, 2, 3)
        )
        out, lse = attend(q, k, v, plan)
        scale = 8**-0.5 * math.sqrt(math.log(8) / math.log(4))
        want, want_lse = attention(q, k, v, plan.to_mask(), scale)
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"base": (0, 5)}, "base along height .* got 0"),
            ({"base": (1, 1)}, "a grid of 2 tokens or more, got"),
            ({"base": (2, 3, 4)}, r"base as \(height, width\)"),
            ({"scaled": 1}, "scaled as true or false, got 1"),
        ],
    )
    def test_refuses(self, options: dict[str, object], sentence: str):
        with pytest.raises(ValueError, match=sentence):
            FreeSwimMethod(**options)


class TestShifted:
    @settings(max_examples=60)
    @given(st.data())
    def test_roll_blocks_roll_back(self, data: st.DataObject):
        layout = data.draw(layouts(data.draw(grids())))
        shape = layout.grid.shape
        window = tuple(data.draw(st.integers(1, n)) for n in shape)
        shift = tuple(data.draw(st.integers(0, 9)) for _ in shape)
        mask = plan_on(ShiftedMethod(window=window, shift=shift), layout).to_mask()[:, 0]
        axes = []
        for extent, w, by in zip(shape, window, shift, strict=True):
            there = torch.arange(extent).roll(-by if w < extent else 0).tolist()
            rows: list[set[int]] = [set() for _ in range(extent)]
            for place, row in enumerate(axis_keys(extent, w, w)):
                rows[there[place]] = {there[key] for key in row}
            axes.append(rows)
        assert torch.equal(mask, sequence_mask(layout, product_reads(axes)))

    @pytest.mark.parametrize("quarter", range(4))
    def test_msw_msa(self, quarter: int):
        """Roll the picture, cut it into 2 x 2, attend in each, roll back (arXiv 2311.17528)."""
        height, width = 8, 16
        method = ShiftedMethod(shift=(0.0, quarter / 4, quarter / 4))
        plan = plan_on(method, TokenGrid(1, height, width))
        q, k, v = (
            torch.randn(1, 2, 128, 8, generator=torch.Generator().manual_seed(i)) for i in (1, 2, 3)
        )
        by = (quarter * height // 8, quarter * width // 8)

        def rolled(x: torch.Tensor, sign: int) -> torch.Tensor:
            picture = x.view(1, 2, height, width, 8)
            return picture.roll([sign * n for n in by], dims=(2, 3))

        q_r, k_r, v_r = (rolled(x, -1) for x in (q, k, v))
        out = torch.empty_like(q_r)
        for a, b in itertools.product(range(2), range(2)):
            rows, columns = slice(4 * a, 4 * a + 4), slice(8 * b, 8 * b + 8)
            part = [x[:, :, rows, columns].reshape(1, 2, 32, 8) for x in (q_r, k_r, v_r)]
            done = torch.nn.functional.scaled_dot_product_attention(*part)
            out[:, :, rows, columns] = done.view(1, 2, 4, 8, 8)
        expected = rolled(out, 1).reshape(1, 2, 128, 8)
        torch.testing.assert_close(attend(q, k, v, plan).out, expected, rtol=1e-5, atol=1e-5)

    def test_swin(self):
        """Half a window of shift and a region mask: pairs that met around the border part."""
        method = ShiftedMethod(window=(4, 4), shift=(2, 2), wrap=False)
        mask = plan_on(method, TokenGrid(1, 8, 12)).to_mask()[0, 0]
        at = TokenGrid(1, 8, 12).coordinates()[:, 1:]
        window = (at + 2) // 4
        assert torch.equal(mask, (window[None] == window[:, None]).all(-1))

    def test_random_shifts_come_with_steps_and_layers(self):
        method = ShiftedMethod(window=(6, 8))
        assert method.scope == "call"
        fixed = [
            plan_on(ShiftedMethod(window=(6, 8), shift=(i * 6 // 4, i * 2)), IMAGE).to_mask()
            for i in range(4)
        ]
        drawn = set()
        for step, layer in itertools.product(range(8), range(4)):
            mask = plan_on(method, IMAGE, step, layer).to_mask()
            assert torch.equal(mask, plan_on(method, IMAGE, step, layer).to_mask())
            drawn.add(next(i for i, other in enumerate(fixed) if torch.equal(mask, other)))
        assert drawn == {0, 1, 2, 3}
        assert any(
            not torch.equal(
                plan_on(method, IMAGE, step).to_mask(),
                plan_on(ShiftedMethod(window=(6, 8), seed=1), IMAGE, step).to_mask(),
            )
            for step in range(8)
        )

    def test_random_shifts_need_a_step(self):
        with pytest.raises(ValueError, match="Expected to know the denoising step for random"):
            plan_on(ShiftedMethod(), IMAGE)
        assert ShiftedMethod(shift=(0, 0, 0)).scope == "layout"

    def test_shares_are_rounded_up(self):
        plan = plan_on(ShiftedMethod(shift=(0, 0, 0), wrap=False), TokenGrid(1, 5, 7))
        assert int(plan.to_mask()[0, 0, 0].sum()) == 3 * 4

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"window": (0.5, 0)}, "window along width .* got 0"),
            ({"shift": "often"}, "shift as one number per axis or"),
            ({"shift": (0, -1)}, "shift along width .* got -1"),
            ({"shift": (1.0, 0)}, r"shift along height .* got 1\.0"),
            ({"shift": (True, 0)}, "shift along height .* got True"),
            ({"wrap": "no"}, "wrap as true or false"),
            ({"seed": 0.5}, "integer seed, got 0.5"),
        ],
    )
    def test_refuses(self, options: dict[str, object], sentence: str):
        with pytest.raises(ValueError, match=sentence):
            ShiftedMethod(**options)


class TestDisk:
    @settings(max_examples=80)
    @given(st.data())
    def test_masks(self, data: st.DataObject):
        layout = data.draw(layouts(data.draw(grids())))
        radius = data.draw(st.integers(1, 9) | st.floats(0.1, 9.0))
        mask = plan_on(DiskMethod(radius=radius), layout).to_mask()[:, 0]

        def reads(q: Place, k: Place) -> bool:
            return (q[1] - k[1]) ** 2 + (q[2] - k[2]) ** 2 < radius**2

        assert torch.equal(mask, sequence_mask(layout, reads))

    @pytest.mark.parametrize(("radius", "keys"), [(8, 193), (16, 793), (32, 3205)])
    def test_the_counts_of_the_paper_s_radii(self, radius: int, keys: int):
        plan = plan_on(DiskMethod(radius=radius), TokenGrid(1, 67, 67))
        middle = int(plan.order.inverse[33 * 67 + 33])
        block = int(plan.q_blocks.of_token[middle])
        first, full = int(plan.offsets[0, 0, block]), int(plan.full[0, 0, block])
        last = first + full + int(plan.partial[0, 0, block])
        starts = plan.k_blocks.starts.tolist()
        seen = 0
        for entry in range(first, last):
            j = int(plan.indices[entry])
            keys_of = slice(starts[j], starts[j + 1])
            whole = entry < first + full
            row = plan.disk.mask(0, slice(middle, middle + 1), keys_of)
            seen += starts[j + 1] - starts[j] if whole else int(row.sum())
        assert seen == keys

    @pytest.mark.parametrize("radius", [3, 4, 5, 13])
    @pytest.mark.parametrize("tile", [None, (2, 3), (4, 5), (7, 2)])
    def test_tiles_are_told_apart_exactly(self, radius: int, tile: tuple[int, int] | None):
        """Also where corners are at the radius, neither nearer nor farther."""
        grid = TokenGrid(1, 28, 26)
        plan = plan_on(DiskMethod(radius=radius, tile=tile, block=64), grid)
        at = grid.coordinates()[plan.order.index]
        mask = ((at[:, None] - at) ** 2).sum(-1) < radius**2
        of = plan.q_blocks.of_token
        sizes = plan.q_blocks.lengths
        pairs = torch.zeros(plan.q_blocks.n, plan.k_blocks.n, dtype=torch.int64)
        q, k = mask.nonzero().unbind(-1)
        pairs.index_put_((of[q], of[k]), torch.ones_like(q), accumulate=True)
        assert torch.equal(plan.visited[0, 0], pairs > 0)
        assert torch.equal(plan.listed("full")[0, 0], pairs == sizes[:, None] * sizes)

    def test_a_radius_beyond_the_grid_is_dense(self):
        plan = plan_on(DiskMethod(radius=16), TokenLayout.of(TokenGrid(2, 11, 11), 3))
        assert plan.disk is None
        assert plan.density == 1.0

    def test_the_scale_of_longer_sequences(self):
        layout = TokenLayout.of(TokenGrid(1, 128, 128), 512)
        method = DiskMethod(radius=8, trained_tokens=64 * 64 + 512)
        assert method.scale(layout) == pytest.approx((math.log(16896) / math.log(4608)) ** 0.5)
        assert method.scale(TokenLayout.of(TokenGrid(1, 64, 64), 512)) == 1.0
        assert DiskMethod().scale(layout) == 1.0
        low = DiskMethod(radius=8, trained_tokens=64 * 64 + 512, down_factor=4)
        assert low.scale(layout) == pytest.approx((math.log(168960) / math.log(4608)) ** 0.5)

    @pytest.mark.parametrize("hoisted", [False, True])
    @pytest.mark.parametrize("factor", [1, 2, 4])
    @pytest.mark.parametrize("text", [(0, 0), (3, 0), (0, 5), (2, 5)])
    def test_low_resolution_beside_the_circle(
        self, text: tuple[int, int], factor: int, hoisted: bool
    ):
        """One softmax over text, circle and the means of all squares; text reads no means."""
        layout = TokenLayout.of(TokenGrid(2, 7, 9), *text)
        method = DiskMethod(radius=2.5, down_factor=factor, trained_tokens=20, tile=(2, 3, 4))
        plan = plan_on(method, layout)
        source = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(2, 3, layout.length, 8, generator=source, dtype=torch.float64)
            for _ in range(3)
        )
        squares = _square_means(layout, factor)
        keys, values = (torch.cat([x, squares @ x], dim=2) for x in (k, v))
        picture = torch.zeros(layout.length, dtype=torch.bool)
        picture[layout.grid_start : layout.grid_start + 126] = True
        mask = torch.cat([plan.to_mask()[0, 0], picture[:, None].expand(-1, len(squares))], dim=1)
        exact, lse = masked_attention(q, keys, values, mask, 8**-0.5 * plan.scale)
        if hoisted:
            order = plan.order
            got = attend(*(order(x) for x in (q, k, v)), in_plan_order(plan))
            got = AttentionOutput(order.undo(got.out), order.undo(got.lse))
        else:
            got = attend(q, k, v, plan)
        torch.testing.assert_close(got.out, exact, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.lse.double(), lse, rtol=1e-5, atol=1e-5)
        again = prepare(q, k, v, plan)[1].again(q, k, v)
        torch.testing.assert_close(again.out, exact, rtol=1e-6, atol=1e-6)
        base = replace(plan, coarse=None).density
        read = int(picture.sum()) * len(squares) / layout.length**2
        assert plan.density == pytest.approx(base + read)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_means_take_some_tokens_at_a_time(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("dit_sparse.coarse._CONVERTED", 5 * 2 * 3 * 8)
        layout = TokenLayout.of(TokenGrid(2, 7, 9), 3, 0)
        cells = plan_on(DiskMethod(radius=2, down_factor=2), layout).coarse
        x = torch.randn(2, 3, layout.length, 8).to(dtype)
        got = means(cells, x)
        assert got.dtype == dtype
        exact = _square_means(layout, 2) @ x.double()
        torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"radius": 0}, "radius above 0 .* got 0"),
            ({"radius": float("nan")}, "radius above 0 .* got nan"),
            ({"radius": True}, "radius above 0 .* got True"),
            ({"radius": "8"}, "radius above 0 .* got '8'"),
            ({"trained_tokens": 1}, "trained_tokens of at least 2, got 1"),
            ({"down_factor": 0}, "down_factor of at least 1 token, got 0"),
            ({"down_factor": 2.0}, "down_factor of at least 1 token, got 2.0"),
        ],
    )
    def test_refuses(self, options: dict[str, object], sentence: str):
        with pytest.raises(ValueError, match=sentence):
            DiskMethod(**options)

    def test_faults_of_low_resolution_are_found(self, tmp_path: Path):
        plan = plan_on(DiskMethod(radius=2, down_factor=2), TokenGrid(1, 6, 8))
        coarse = plan.coarse
        assert coarse is not None
        for wrong, sentence in (
            (replace(coarse, cell=coarse.cell[1:]), r"coarse.cell of shape \[48\]"),
            (replace(coarse, cell=coarse.cell.int()), "coarse.cell of dtype torch.int64"),
            (replace(coarse, cell=coarse.cell.to("meta")), "coarse.cell on cpu, .* got meta"),
            (replace(coarse, plan=coarse.plan.to("meta")), "coarse.plan on cpu, .* got meta"),
            (replace(coarse, cell=coarse.cell + 12), "numbers of 0 to 12, got .* 12 to 23"),
            (replace(coarse, plan=plan), "without an order and coarse keys"),
            (replace(coarse, plan=in_plan_order(replace(plan, coarse=None))), "48 queries and 12"),
        ):
            with pytest.raises(ValueError, match=sentence):
                check(replace(plan, coarse=wrong))
        with pytest.raises(ValueError, match="plan without coarse keys"):
            save_plan(plan, tmp_path / "plan.safetensors")


def _square_means(layout: TokenLayout, factor: int) -> torch.Tensor:
    """`[M, N]` that makes the means of the squares of every frame."""
    frames, height, width = layout.grid.shape
    rows = []
    for frame, y, x in itertools.product(
        range(frames), range(0, height, factor), range(0, width, factor)
    ):
        row = torch.zeros(layout.length, dtype=torch.float64)
        for i, j in itertools.product(range(y, y + factor), range(x, x + factor)):
            if i < height and j < width:
                row[layout.grid_start + (frame * height + i) * width + j] = 1.0
        rows.append(row / row.sum())
    return torch.stack(rows)


class TestAnchors:
    def test_windows_and_a_second_grid(self):
        """Scale-DiT: own window, all of the low resolution, all text."""
        layout = TokenLayout((TextSpan(3), TokenGrid(1, 10, 12), TokenGrid(1, 3, 3)))
        plan = plan_on(AnchorMethod(window=(4, 4), pool=None), layout)

        def reads(q: Place, k: Place) -> bool:
            return q[1] // 4 == k[1] // 4 and q[2] // 4 == k[2] // 4

        assert torch.equal(plan.to_mask()[:, 0], sequence_mask(layout, reads))
        assert plan.pools is None
        assert not plan.partial.any()

    @pytest.mark.parametrize("shape", [(1, 16, 24), (2, 8, 16), (1, 16, 8)])
    def test_own_windows_exactly_and_the_rest_by_cells(self, shape: tuple[int, int, int]):
        grid = TokenGrid(*shape)
        layout = TokenLayout((grid, TextSpan(2)))
        window, pool = (1, 8, 8), (1, 2, 4)
        plan = plan_on(AnchorMethod(window=window, pool=pool, block=64), layout)
        n = layout.length
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 1, n, 6, generator=generator) for _ in range(3))
        out, lse = attend(q, k, v, plan)
        places = list(itertools.product(*map(range, shape)))
        cells: dict[Place, list[int]] = {}
        for i, place in enumerate(places):
            cells.setdefault(tuple(a // p for a, p in zip(place, pool, strict=True)), []).append(i)
        for i, place in enumerate(places):
            own = [a // w for a, w in zip(place, window, strict=True)]
            items = [(k[0, 0, j], v[0, 0, j], 1) for j in range(len(places), n)]
            for cell in cells.values():
                same = [a // w for a, w in zip(places[cell[0]], window, strict=True)] == own
                for group in [[j] for j in cell] if same else [cell]:
                    items.append((k[0, 0, group].mean(0), v[0, 0, group].mean(0), len(group)))
            logits = torch.tensor([q[0, 0, i] @ key * 6**-0.5 + math.log(c) for key, _, c in items])
            values = torch.stack([value for _, value, _ in items])
            torch.testing.assert_close(out[0, 0, i], logits.softmax(0) @ values)
            torch.testing.assert_close(lse[0, 0, i], logits.logsumexp(0))

    def test_a_window_of_the_grid_is_dense(self):
        plan = plan_on(AnchorMethod(), TokenGrid(1, 12, 16))
        assert bool(plan.listed("full").all())

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"window": (16, 0)}, "window along width .* got 0"),
            ({"pool": (4, 3)}, "pool along width of a power of two, got 3"),
            ({"pool": (1, 1)}, "pool of 2 to 128 tokens"),
            ({"pool": (16, 16)}, "got 256"),
        ],
    )
    def test_refuses(self, options: dict[str, object], sentence: str):
        with pytest.raises(ValueError, match=sentence):
            AnchorMethod(**options)

    def test_refuses_windows_that_cut_cells(self):
        with pytest.raises(ValueError, match=r"window along width of a multiple of 4 tokens, .* 6"):
            plan_on(AnchorMethod(window=(8, 6), pool=(4, 4)), TokenGrid(1, 16, 16))
