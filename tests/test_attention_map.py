"""Block statistics of softmax maps, orders and masks (tests P5, P6, P7 and P11)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from dit_sparse import attention_map, orders
from dit_sparse.attention_map import MapMetrics, block_statistics, map_metrics, picture_sums
from dit_sparse.block_budget import by_density, by_mass, choose_orders, kept_mass, row_shares
from dit_sparse.frame import Frame, frame_of
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.step_segments import segment_table
from tests.selection_cases import LAYOUTS, ordered, qkv, ranges

GRID = TokenGrid(8, 8, 8)
LAYOUT = TokenLayout.of(GRID)
# The axis that a head attends along, or within, and the orders that make blocks of that.
LOCAL = [
    ("along F", (1, 2), {"HWF", "WHF"}),
    ("along H", (0, 2), {"FWH", "WFH"}),
    ("along W", (0, 1), {"FHW", "HFW"}),
    ("same F", (0,), {"FHW", "FWH"}),
    ("same H", (1,), {"HWF", "HFW"}),
    ("same W", (2,), {"WHF", "WFH"}),
]


def soft_map(q: Tensor, k: Tensor, hidden: Tensor | None) -> Tensor:
    scores = q.double() @ k.double().transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores if hidden is None else scores.masked_fill(hidden, -math.inf)


def one_hot_head(axes: tuple[int, ...], strength: float = 6.0) -> Tensor:
    """q = k `[1, N, D]` of a head that attends to the tokens with its coordinates on these axes."""
    at = GRID.coordinates()
    parts = [torch.nn.functional.one_hot(at[:, axis], 8).double() for axis in axes]
    x = torch.cat(parts, dim=1)
    return (strength * math.sqrt(x.shape[1]) ** 0.5 * x)[None]


def metrics_of(q: Tensor, layout: TokenLayout = LAYOUT, block: int = 8) -> MapMetrics:
    """`[orders, H]` of the six axis orders.

    In blocks of 8 a diagonal is 12 % of its block; a thinner one the paper calls skippable.
    """
    found = []
    for name in orders.AXES:
        frame = frame_of(layout, block, name)
        x = ordered(q[None], frame)[0]
        bound = attention_map.small_weight(layout.length)
        found.append(map_metrics(block_statistics(x, x, frame.blocks, bound), frame))
    return MapMetrics(*(torch.stack(x) for x in zip(*found, strict=True)))


class TestStatistics:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("order", ["raster", "WFH"])
    @pytest.mark.parametrize("room", [1, 1 << 22])
    def test_equals_the_whole_map(
        self, layout: str, order: str, room: int, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(attention_map, "_WEIGHTS", room)
        frame = frame_of(LAYOUTS[layout], 64, order)
        q, k, _ = (ordered(x, frame)[-1].double() for x in qkv(layout))
        hidden = None if frame.hidden is None else frame.hidden[-1]
        bound = 1.5 / LAYOUTS[layout].length
        got = block_statistics(q, k, frame.blocks, bound, hidden)
        of = frame.blocks.of_token
        weights = soft_map(q, k, None if hidden is None else hidden[of]).softmax(-1)
        for i, rows in enumerate(ranges(frame.blocks)):
            for j, columns in enumerate(ranges(frame.blocks)):
                if hidden is not None and hidden[j]:
                    assert not got.sums[:, i, j].any()
                    continue
                part = weights[:, list(rows)][:, :, list(columns)]
                torch.testing.assert_close(got.sums[:, i, j], part.sum((1, 2)))
                torch.testing.assert_close(got.maxima[:, i, j], part.amax((1, 2)))
                assert got.small[:, i, j].tolist() == (part < bound).sum((1, 2)).tolist()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_in_low_precision_it_is_computed_in_fp32(self, dtype: torch.dtype):
        frame = frame_of(LAYOUTS["text"], 64)
        q, k, _ = (x[0].to(dtype) for x in qkv("text"))
        got = block_statistics(q, k, frame.blocks, 1e-3)
        expected = block_statistics(q.double(), k.double(), frame.blocks, 1e-3)
        assert got.sums.dtype == torch.float32
        torch.testing.assert_close(got.sums.double(), expected.sums, rtol=1e-5, atol=1e-6)

    def test_rows_sum_to_their_tokens(self):
        frame = frame_of(LAYOUTS["text"], 64)
        q, k, _ = (x[0] for x in qkv("text"))
        sums = block_statistics(q, k, frame.blocks, 1e-3).sums
        torch.testing.assert_close(sums.sum(-1), frame.blocks.lengths.float().expand(3, -1))

    def test_the_picture_alone(self):
        frame = frame_of(LAYOUTS["text"], 64)
        q, k, _ = (x[0] for x in qkv("text"))
        statistics = block_statistics(q, k, frame.blocks, 1e-3)
        first = int((~frame.context).nonzero()[0])
        last = first + frame.candidates
        expected = statistics.sums[:, first:last, first:last]
        assert torch.equal(picture_sums(statistics, frame), expected)


class TestOrders:
    @pytest.mark.parametrize(("name", "axes", "expected"), LOCAL, ids=[name for name, *_ in LOCAL])
    @pytest.mark.parametrize("criterion", ["paper", "concentration"])
    def test_local_heads_choose_what_makes_blocks(
        self, name: str, axes: tuple[int, ...], expected: set[str], criterion: str
    ):
        """P5. A head local along F has its other two coordinates in common with its keys."""
        # A block of 8 is one line of the grid, so that planes need 16 to tell them apart.
        metrics = metrics_of(one_hot_head(axes), block=8 if len(axes) == 2 else 16)
        assert orders.AXES[int(choose_orders(metrics, criterion))] in expected

    def test_the_paper_calls_thin_diagonals_skippable(self):
        """Why there is another criterion: the orders that keep this head whole lose to raster."""
        metrics = metrics_of(one_hot_head((1, 2)), block=64)
        raster, blocked = orders.AXES.index("FHW"), orders.AXES.index("HWF")
        assert metrics.sparse[raster] == 1.0 > metrics.sparse[blocked]
        assert metrics.concentration[raster] == pytest.approx(1 / 8)
        assert metrics.concentration[blocked] > 0.9

    def test_a_head_without_a_pattern_keeps_the_first(self):
        """P5: equal costs."""
        metrics = metrics_of(torch.zeros(1, GRID.length, 4, dtype=torch.float64))
        assert metrics.incoherence.flatten().tolist() == pytest.approx([1.0] * 6)
        assert choose_orders(metrics).tolist() == [0]

    @pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
    def test_blocks_beat_diagonals(self, alpha: float):
        """P6, the sign: as the paper prints the cost, alpha 1 would choose the worst order."""
        metrics = metrics_of(one_hot_head((1, 2)))
        raster, blocked = orders.AXES.index("FHW"), orders.AXES.index("HWF")
        assert metrics.sparse[blocked] > metrics.sparse[raster]
        assert metrics.incoherence[blocked] < metrics.incoherence[raster]
        assert orders.AXES[int(choose_orders(metrics, alpha=alpha))] in ("HWF", "WHF")

    def test_a_block_diagonal_map(self):
        """P6: nearly all blocks can go."""
        frame = frame_of(LAYOUT, 64)
        x = one_hot_head((0,), strength=12.0)
        metrics = map_metrics(block_statistics(x, x, frame.blocks, 17 / 512), frame)
        assert float(metrics.sparse) == pytest.approx(1.0)  # 1/64 < 17/512: all weights are small
        metrics = map_metrics(block_statistics(x, x, frame.blocks, 1 / 512), frame)
        assert float(metrics.sparse) == pytest.approx(7 / 8)

    def test_metrics_do_not_see_the_numbering_of_blocks(self):
        """P6."""
        frame = frame_of(LAYOUT, 64)
        q, k = torch.randn(2, 3, 512, 16, generator=torch.Generator().manual_seed(0)).double()
        shuffled = torch.randperm(8).repeat_interleave(64) * 64 + torch.arange(64).repeat(8)
        bound = 1 / 512
        one = map_metrics(block_statistics(q, k, frame.blocks, bound), frame)
        other = map_metrics(
            block_statistics(q[:, shuffled], k[:, shuffled], frame.blocks, bound), frame
        )
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b)

    def test_a_grid_of_less_than_a_block(self):
        metrics = metrics_of(torch.randn(2, 12, 4), TokenLayout.of(TokenGrid(1, 3, 4)), block=64)
        assert choose_orders(metrics).tolist() == [0, 0]


def some_shares(heads: int = 3, n: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return row_shares(torch.rand(heads, n, n, generator=generator) ** 8)


NONE = torch.zeros(12, 12, dtype=torch.bool)


class TestMasks:
    def test_masks_by_mass_are_nested(self):
        """P7."""
        shares = some_shares()
        masks = [by_mass(shares, mass, NONE) for mass in (0.01, 0.3, 0.6, 0.9, 0.99, 1.0)]
        for smaller, larger in itertools.pairwise(masks):
            assert not (smaller & ~larger).any()
        assert masks[0].sum(-1).eq(1).all()
        assert masks[-1].all()

    @pytest.mark.parametrize("mass", [0.2, 0.5, 0.9])
    def test_the_mass_is_held_by_no_block_too_many(self, mass: float):
        shares = some_shares()
        kept = by_mass(shares, mass, NONE)
        assert ((shares * kept).sum(-1) >= mass - 1e-12).all()
        least = shares.masked_fill(~kept, math.inf).amin(-1)
        assert ((shares * kept).sum(-1) - least < mass).all()

    def test_mass_one_keeps_rows_of_zeros(self):
        shares = row_shares(torch.zeros(1, 4, 4))
        assert by_mass(shares, 1.0, torch.zeros(4, 4, dtype=torch.bool)).all()

    @pytest.mark.parametrize("shared", [True, False])
    @pytest.mark.parametrize("density", [0.1, 0.3, 0.77, 1.0])
    def test_the_density_is_met(self, density: float, shared: bool):
        """P7: within one block of a row; here, within one block of the whole mask."""
        mask = by_density(some_shares(), density, NONE, shared=shared)
        assert mask.any(-1).all()
        measured = mask.double().mean((1, 2)) if not shared else mask.double().mean()
        assert ((density - measured).abs() <= 1 / 144 + 1e-12).all()

    def test_heads_share_a_budget(self):
        flat, sharp = torch.ones(12, 12), torch.eye(12) + 1e-3
        shares = row_shares(torch.stack([flat, sharp]))
        shared = by_density(shares, 0.3, NONE, shared=True)
        apart = by_density(shares, 0.3, NONE, shared=False)
        assert apart.sum((1, 2)).tolist() == [43, 43]
        assert shared.sum((1, 2)).tolist() == [86 - 12, 12]
        assert kept_mass(shares, shared).sum() > kept_mass(shares, apart).sum()

    def test_what_is_kept_is_the_largest(self):
        shares = some_shares(1)
        mask = by_density(shares, 0.4, NONE, shared=True)
        best = torch.zeros_like(mask).scatter_(-1, shares.argmax(-1, keepdim=True), True)
        assert shares[mask & ~best].min() >= shares[~mask].max()

    def test_forced_blocks_count(self):
        forced = NONE.clone()
        forced[-1], forced[:, -1] = True, True
        mask = by_density(some_shares(), 0.5, forced, shared=True)
        assert mask[:, forced].all()
        assert mask.sum() == 216

    def test_a_density_without_room_is_refused(self):
        with pytest.raises(ValueError, match=r"at least 0\.0834 for 12 x 12 blocks, .*got 0\.05"):
            by_density(some_shares(), 0.05, NONE, shared=True)

    def test_kept_mass(self):
        shares = some_shares()
        assert kept_mass(shares, torch.ones_like(shares)).tolist() == pytest.approx([1.0] * 3)
        half = by_mass(shares, 0.5, NONE)
        assert (kept_mass(shares, half) >= 0.5).all()


class TestSegments:
    """P11."""

    def test_a_mask_for_every_step(self):
        assert segment_table(30, 30) == tuple(range(30))

    def test_steps_that_do_not_divide(self):
        assert segment_table(50, 4) == (*[0] * 13, *[1] * 12, *[2] * 13, *[3] * 12)

    def test_the_second_half_shares(self):
        assert segment_table(8, 3, "halves") == (0, 0, 1, 1, 2, 2, 2, 2)
        assert segment_table(5, 1, "halves") == (0,) * 5

    @pytest.mark.parametrize(
        ("steps", "segments", "split"), [(4, 5, "uniform"), (4, 0, "uniform"), (4, 4, "halves")]
    )
    def test_too_many(self, steps: int, segments: int, split: str):
        with pytest.raises(ValueError, match=rf"segments of {steps} steps .*got {segments}\."):
            segment_table(steps, segments, split)


def test_frames_of_all_orders_are_cut_alike():
    frames: list[Frame] = [frame_of(LAYOUTS["text"], 64, name) for name in orders.AXES]
    for frame in frames:
        assert torch.equal(frame.blocks.starts, frames[0].blocks.starts)
