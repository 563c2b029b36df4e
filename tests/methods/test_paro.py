"""PARO online: orders per head, static masks, segments of the steps (tests P1 to P4, P8, P11)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dit_sparse import orders
from dit_sparse.attention import attend
from dit_sparse.grid import Permutation, TextSpan, TokenGrid, TokenLayout
from dit_sparse.method import CallContext, SparseMethod
from dit_sparse.methods.paro import ParoMethod
from dit_sparse.methods.pisa import PisaMethod
from dit_sparse.methods.schedule import Schedule, parts
from dit_sparse.model_identity import ModelIdentity
from dit_sparse.plan_cache import PlanCache
from dit_sparse.plan_check import check
from tests.oracle import masked_attention, planned_attention
from tests.paro_cases import (
    BLOCK,
    GRID,
    MODEL,
    blocks_of,
    calibration,
    context,
    method,
    random_masks,
)

HEADS = (0.2, 0.3, 0.5, 0.9)
MIXED = ("HWF", "FHW", "WFH", "FWH")
TEXT = TokenLayout.of(GRID, 10, 23)
# Section 1.3 of the specification: permutation of the axes (F, H, W), and its inverse.
TABLE = {
    "FHW": ((0, 1, 2), (0, 1, 2)),
    "FWH": ((0, 2, 1), (0, 2, 1)),
    "HWF": ((1, 2, 0), (2, 0, 1)),
    "HFW": ((1, 0, 2), (1, 0, 2)),
    "WHF": ((2, 1, 0), (2, 1, 0)),
    "WFH": ((2, 0, 1), (1, 2, 0)),
}


def qkv(layout: TokenLayout, heads: int = 4, seed: int = 0, batch: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, layout.length, 8)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))


def element_mask(layout: TokenLayout, blocks: Tensor, names: tuple[str, ...]) -> Tensor:
    """bool `[H, N, N]` in the model's order: what section 1.7 reads, token by token."""
    start, length = layout.grid_start, GRID.length
    mask = torch.ones(len(names), layout.length, layout.length, dtype=torch.bool)
    for head, name in enumerate(names):
        index = torch.arange(length).view(GRID.shape).permute(TABLE[name][0]).flatten()
        place = torch.empty_like(index)
        place[index] = torch.arange(length)
        block = place // BLOCK
        of_pair = blocks[head][block[:, None], block]
        mask[head, start : start + length, start : start + length] = of_pair
    return mask


@pytest.mark.parametrize("grid", [TokenGrid(13, 30, 45), TokenGrid(1, 4, 6)], ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_the_six_orders(name: str, grid: TokenGrid):
    """P1."""
    to, back = TABLE[name]
    raster = torch.arange(grid.length).view(grid.shape)
    order = orders.axes(grid, name)
    assert torch.equal(order.index, raster.permute(to).flatten())
    assert torch.equal(order.index.view([grid.shape[a] for a in to]).permute(back), raster)
    for layout in (TokenLayout.of(grid), TokenLayout.of(grid, 226)):
        lifted = orders.lift(order, layout)
        x = torch.arange(layout.length).view(1, 1, -1)
        assert torch.equal(lifted.undo(lifted(x)), x)
        assert torch.equal(lifted.index[: layout.grid_start], x[0, 0, : layout.grid_start])


@pytest.mark.parametrize("layout", [TokenLayout.of(GRID), TEXT], ids=str)
def test_dense_attention_does_not_see_the_order(layout: TokenLayout):
    """P2, for all six at once."""
    q, k, v = qkv(layout, heads=6)
    index = torch.stack([orders.axes(GRID, name).index for name in TABLE])
    order = orders.lift(Permutation(index), layout)
    got = order.undo(masked_attention(order(q), order(k), order(v))[0])
    torch.testing.assert_close(got, masked_attention(q, k, v)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [TokenLayout.of(GRID), TEXT], ids=str)
@pytest.mark.parametrize("tail", ["none", "zeroth"])
def test_all_blocks_are_dense_attention(layout: TokenLayout, tail: str, tmp_path: Path):
    """P3."""
    n = blocks_of()
    found = calibration({0: torch.ones(1, 4, n, n, dtype=torch.bool)}, [MIXED])
    q, k, v = qkv(layout)
    plan = check(method(found, tmp_path, tail).plan(q, k, context(found, layout)))
    assert plan.density == 1.0
    got = attend(q, k, v, plan, backend="reference").out
    torch.testing.assert_close(got, masked_attention(q, k, v)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", [TokenLayout.of(GRID), TEXT], ids=str)
def test_random_masks(layout: TokenLayout, tmp_path: Path):
    """P4: 200 seeds at four densities; 0.2 has runs of skipped blocks, first blocks among them."""
    masks = torch.stack([random_masks(1, HEADS, blocks_of(), seed)[0] for seed in range(200)])
    found = calibration({0: masks}, [MIXED] * 200)
    paro = method(found, tmp_path)
    for layer in range(200):
        q, k, v = qkv(layout, seed=layer, batch=1)
        plan = paro.plan(q, k, context(found, layout, layer))
        got = attend(q, k, v, plan, backend="reference").out
        expected = masked_attention(q, k, v, element_mask(layout, masks[layer], MIXED))[0]
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_the_tail_stands_for_what_is_not_read(tmp_path: Path):
    masks = random_masks(1, HEADS, blocks_of())
    found = calibration({0: masks}, [MIXED])
    q, k, v = qkv(TEXT, batch=1)
    plan = check(method(found, tmp_path, "zeroth").plan(q, k, context(found, TEXT)))
    assert plan.tail == "zeroth"
    got = attend(q, k, v, plan, backend="reference").out
    torch.testing.assert_close(got, planned_attention(q, k, v, plan)[0], rtol=1e-9, atol=1e-9)
    dropped = element_mask(TEXT, masks[0], MIXED)
    assert not torch.allclose(got, masked_attention(q, k, v, dropped)[0], atol=1e-3)


def test_a_pisa_tail_in_the_order_of_the_head_needs_no_mask(tmp_path: Path):
    """PARO's order and PISA's choice on the same blocks give PISA's result."""
    layout = TokenLayout.of(TokenGrid(1, 16, 16))
    q, k, v = (x[:, :1] for x in qkv(layout, batch=1))
    pisa = PisaMethod(density=0.5, tail="zeroth", order="FWH", block=64)
    chosen = pisa.plan(q, k, CallContext(layout))
    found = calibration({0: chosen.visited}, [["FWH"]], grid=layout.grid, block=64)
    plan = method(found, tmp_path, "zeroth").plan(q, k, context(found))
    outs = [attend(q, k, v, p, backend="reference").out for p in (plan, chosen)]
    torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("text", [226, 64, 1])
def test_text_is_read_exactly_and_moves_no_block(text: int, tmp_path: Path):
    """P8. The public masks begin 30 video tokens late at 226 tokens of text; here none do."""
    layout = TokenLayout.of(GRID, text)
    found = calibration({0: torch.zeros(1, 1, 7, 7, dtype=torch.bool)}, [["FHW"]])
    q, k, _ = qkv(layout, heads=1)
    mask = method(found, tmp_path).plan(q, k, context(found, layout)).to_mask()[0, 0]
    assert mask[:text].all()
    assert mask[:, :text].all()
    assert not mask[text:, text:].any()


def test_padding_is_not_read(tmp_path: Path):
    layout = TokenLayout((TextSpan(20, (20, 3)), GRID))
    found = calibration({0: random_masks(1, HEADS, 7)}, [MIXED])
    q, k, _ = qkv(layout)
    mask = check(method(found, tmp_path).plan(q, k, context(found, layout))).to_mask()
    assert not mask[1, :, :, 3:20].any()
    assert mask[0, :, :, :20].all()


def test_heads_that_agree_share_their_order(tmp_path: Path):
    masks = {0: random_masks(2, HEADS, 7)}
    found = calibration(masks, [["FHW"] * 4, ["WFH"] * 4])
    paro = method(found, tmp_path)
    q, k, _ = qkv(TokenLayout.of(GRID))
    assert paro.plan(q, k, context(found, layer=0)).order is None
    order = paro.plan(q, k, context(found, layer=1)).order
    assert order is not None
    assert order.index.ndim == 1


class TestSegments:
    """P11, and that plans are kept as long as they hold."""

    def made(self, tmp_path: Path) -> ParoMethod:
        masks = {s: random_masks(2, HEADS, 7, seed=s) for s in range(2)}
        return method(calibration(masks, [MIXED] * 2, (0, 0, 1, 1)), tmp_path)

    def test_every_step_has_the_mask_of_its_segment(self, tmp_path: Path):
        paro = self.made(tmp_path)
        found = paro.calibration
        q, k, _ = qkv(TokenLayout.of(GRID))
        for step, segment in enumerate((0, 0, 1, 1)):
            assert paro.segment(context(found, step=step)) == segment
            for layer in range(2):
                plan = paro.plan(q, k, context(found, layer=layer, step=step))
                assert torch.equal(plan.visited[0], found.mask(segment, layer))

    def test_of_a_layer_the_latest_plan_is_kept(self, tmp_path: Path):
        paro = self.made(tmp_path)
        plans, q = PlanCache(paro), qkv(TokenLayout.of(GRID))[0]
        kept = [
            plans.get(q, q, context(paro.calibration, layer=layer, step=step))
            for step in range(4)
            for layer in range(2)
        ]
        assert kept[0] is kept[2]
        assert kept[4] is kept[6]
        assert kept[0].plan is not kept[4].plan
        assert len(plans) == 2
        again = plans.get(q, q, context(paro.calibration, step=0)).plan
        assert torch.equal(again.visited, kept[0].plan.visited)

    def test_in_a_schedule(self, tmp_path: Path):
        paro = self.made(tmp_path)
        schedule = Schedule(paro, dense_first=1, layers=((1, PisaMethod()),))
        assert Schedule(paro).scope == "segment"
        assert set(parts(schedule)) == {paro, PisaMethod()}
        plans, q = PlanCache(Schedule(paro)), qkv(TokenLayout.of(GRID))[0]
        one, two = (plans.get(q, q, context(paro.calibration, step=step)) for step in (0, 2))
        assert not torch.equal(one.plan.visited, two.plan.visited)


class TestRefusals:
    def made(self, tmp_path: Path) -> ParoMethod:
        return method(calibration({0: random_masks(1, HEADS, 7)}, [MIXED], (0, 0, 1, 1)), tmp_path)

    def plan(self, paro: ParoMethod, ctx: CallContext, heads: int = 4) -> None:
        q = torch.zeros(1, heads, ctx.layout.length, 8)
        paro.plan(q, q, ctx)

    def test_another_grid(self, tmp_path: Path):
        paro = self.made(tmp_path)
        ctx = context(paro.calibration, TokenLayout.of(TokenGrid(3, 5, 8)))
        with pytest.raises(ValueError, match=r"3x5x7 tokens, got 3x5x8\. Use the height, width"):
            self.plan(paro, ctx)

    def test_another_number_of_layers_or_heads(self, tmp_path: Path):
        paro = self.made(tmp_path)
        with pytest.raises(ValueError, match=r"1 attention layers of 4 heads.*got 2 layers and 4"):
            self.plan(paro, CallContext(TokenLayout.of(GRID), 0, 2, 0, 4))
        with pytest.raises(ValueError, match="got 1 layers and 5 heads"):
            self.plan(paro, context(paro.calibration), heads=5)

    def test_another_number_of_steps(self, tmp_path: Path):
        paro = self.made(tmp_path)
        with pytest.raises(ValueError, match=r"Expected the 4 denoising steps .* step 0 of 30\."):
            self.plan(paro, CallContext(TokenLayout.of(GRID), 0, 1, 0, 30))
        with pytest.raises(ValueError, match=r"or pass steps=\."):
            self.plan(paro, CallContext(TokenLayout.of(GRID), 0, 1))

    def test_steps_that_were_not_seen(self, tmp_path: Path):
        paro = self.made(tmp_path)
        with pytest.raises(ValueError, match="got step 2 or later in its segment 1"):
            self.plan(paro, context(paro.calibration, step=3))

    def test_another_model(self, tmp_path: Path):
        paro = self.made(tmp_path)
        paro.check_model(ModelIdentity(MODEL.kind, MODEL.config, "owner/fine-tuned"))
        other = ModelIdentity(MODEL.kind, "1" * 64, "owner/large")
        with pytest.raises(ValueError, match=r"owner/name .*got .*owner/large .*Calibrate this"):
            paro.check_model(other)

    def test_no_calibration(self, tmp_path: Path):
        with pytest.raises(ValueError, match=r"Expected a calibration in .*'No such file"):
            ParoMethod(str(tmp_path))

    def test_an_unknown_tail(self, tmp_path: Path):
        with pytest.raises(ValueError, match="Expected tail among none, zeroth, got 'first'"):
            ParoMethod(str(tmp_path), "first")


def test_it_is_a_frozen_record(tmp_path: Path):
    found = calibration({0: random_masks(1, HEADS, 7)}, [MIXED])
    paro = method(found, tmp_path)
    assert isinstance(paro, SparseMethod)
    assert paro == ParoMethod(str(tmp_path))
    assert hash(paro) == hash(ParoMethod(str(tmp_path)))
    assert copy.deepcopy(paro).calibration is paro.calibration


@pytest.mark.parametrize("tail", ["none", "zeroth"])
@pytest.mark.parametrize(
    "layout",
    [
        TokenLayout.of(GRID),
        TEXT,
        TokenLayout((TextSpan(40, (12, 40)), GRID, TextSpan(33, (20, 1)))),
    ],
    ids=str,
)
def test_lists_are_as_long_as_what_is_read(layout: TokenLayout, tail: str, tmp_path: Path):
    found = calibration({0: random_masks(1, HEADS, 7)}, [MIXED])
    q, k, _ = qkv(layout)
    plan = method(found, tmp_path, tail).plan(q, k, context(found, layout))
    check(plan)
    assert plan.indices.numel() == int((plan.full + plan.partial).sum())
    frame = method(found, tmp_path).frame(q, context(found, layout))
    picture = ~frame.context
    read = plan.listed("full")[:, :, picture][..., picture]
    assert torch.equal(read, found.mask(0, 0).expand_as(read))
