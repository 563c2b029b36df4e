"""PSA against the definition of its paper in float64 (tests S1 to S11; the curve is in orders)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.attention import attend
from dit_sparse.frame import Frame, frame_of
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.importance import sampled_importance
from dit_sparse.levels import plan_of_levels
from dit_sparse.method import CallContext
from dit_sparse.methods.psa import PsaMethod
from dit_sparse.plan import BlockPlan
from dit_sparse.plan_check import check
from tests.oracle import masked_attention
from tests.selection_cases import LAYOUTS, ordered, qkv, ranges

FACTORS = (2, 4, 8)
all_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def run(method: PsaMethod, layout: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    plan = check(method.plan(q, k, CallContext(LAYOUTS[layout], step=0)))
    return attend(q, k, v, plan, backend="reference").out


def doubles(layout: str) -> tuple[Tensor, ...]:
    return tuple(x.double() for x in qkv(layout))


def levels_of(plan: BlockPlan) -> Tensor:
    """The level matrix that a plan says."""
    level = plan.listed("full").int()
    start = plan.offsets + plan.full + plan.partial
    for factor, counts in zip(plan.pools.factors, plan.pools.counts.unbind(-1), strict=True):
        for row in torch.cartesian_prod(*map(torch.arange, plan.offsets.shape)).tolist():
            at = int(start[tuple(row)])
            listed = plan.indices[at : at + int(counts[tuple(row)])].long()
            level[(*row, listed)] = factor
        start = start + counts
    return level


def repeated(level: Tensor, cut: Frame, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The bias-free definition of section 2.4: every pooled row stands once for each of its keys.

    Dense attention over keys and values that are replaced by the mean of their group, one query
    block and level row at a time.
    """
    qs, ks, vs = (ordered(x, cut) for x in (q, k, v))
    out = torch.zeros_like(qs)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i, rows in enumerate(ranges(cut.blocks)):
                keys, values = [], []
                for j, block in enumerate(ranges(cut.blocks)):
                    factor = int(level[b % len(level), h % level.shape[1], i, j])
                    if factor == 0:
                        continue
                    for first in range(block.start, block.stop, factor):
                        last = min(first + factor, block.stop)
                        for rows_of, found in ((ks, keys), (vs, values)):
                            mean = rows_of[b, h, first:last].mean(0)
                            found += [mean] * (last - first)
                if keys:
                    x = qs[b, h, list(rows)]
                    out[b, h, list(rows)] = masked_attention(
                        x, torch.stack(keys), torch.stack(values)
                    )[0]
    return out if cut.order is None else cut.order.undo(out)


class TestDefinition:
    @all_layouts
    @pytest.mark.parametrize("allocation", ["quantile", "mass"])
    def test_every_level_is_a_repetition(self, layout: str, allocation: str):
        q, k, v = doubles(layout)
        method = PsaMethod(ends=(0.3, 0.5, 0.75, 1.0), allocation=allocation, block=64)
        plan = method.plan(q, k, CallContext(LAYOUTS[layout]))
        cut = frame_of(LAYOUTS[layout], 64, "hilbert")
        expected = repeated(levels_of(plan), cut, q, k, v)
        torch.testing.assert_close(run(method, layout, q, k, v), expected, rtol=1e-9, atol=1e-9)

    @all_layouts
    def test_level_one_everywhere_is_dense(self, layout: str):
        """S1."""
        q, k, v = doubles(layout)
        cut = frame_of(LAYOUTS[layout], 64, "hilbert")
        for allocation in ("quantile", "mass"):
            method = PsaMethod(ends=(1.0, 1.0, 1.0, 1.0), allocation=allocation, block=64)
            level = torch.ones(2, 1, cut.blocks.n, cut.blocks.n)
            if cut.hidden is not None:
                level = level.masked_fill(cut.hidden[:, None, None], 0)
            expected = repeated(level, cut, q, k, v)
            torch.testing.assert_close(run(method, layout, q, k, v), expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("factor", FACTORS)
    @pytest.mark.parametrize("layout", ["image", "ragged"])
    def test_one_level_everywhere(self, layout: str, factor: int):
        """S2 and S5: dense over repeated means; and without a score, the mean of all."""
        q, k, v = doubles(layout)
        ends = tuple(float(g >= factor) for g in (1, 2, 4, 8))
        method = PsaMethod(ends=ends, block=64, order="raster")
        cut = frame_of(LAYOUTS[layout], 64)
        level = torch.full((1, 1, cut.blocks.n, cut.blocks.n), factor)
        expected = repeated(level, cut, q, k, v)
        torch.testing.assert_close(run(method, layout, q, k, v), expected, rtol=1e-9, atol=1e-9)
        flat = run(method, layout, torch.zeros_like(q), k, v)
        torch.testing.assert_close(flat, v.mean(2, keepdim=True).expand_as(v))

    def test_keys_and_values_constant_in_groups_of_eight(self):
        """S3: any levels equal the mask of what is kept."""
        q, k, v = doubles("image")
        k, v = (x[:, :, ::8].repeat_interleave(8, dim=2) for x in (k, v))
        method = PsaMethod(ends=(0.25, 0.5, 0.75, 0.75), block=64, order="raster")
        plan = method.plan(q, k, CallContext(LAYOUTS["image"]))
        expected = masked_attention(q, k, v, plan.to_mask())[0]
        torch.testing.assert_close(run(method, "image", q, k, v), expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("skipped", ["drop", "mean"])
    def test_constant_values_come_out_again(self, skipped: str):
        """S4."""
        q, k, v = doubles("ragged")
        v = v[:, :, :1].expand_as(v)
        method = PsaMethod(ends=(0.2, 0.4, 0.6, 0.8), block=64, skipped=skipped)
        torch.testing.assert_close(run(method, "ragged", q, k, v), v, rtol=1e-9, atol=1e-9)

    def test_a_block_of_one_token_weighs_one_token(self):
        """S7: 897 keys in blocks of 128, all pooled by 8, no score: 1/897 for the last one."""
        q = torch.zeros(1, 1, 897, 4, dtype=torch.float64)
        v = torch.zeros(1, 1, 897, 1, dtype=torch.float64)
        v[:, :, -1] = 1
        cut = frame_of(LAYOUTS["one token"], 128)
        blocks = type(cut.blocks).uniform(897, 128)
        level = torch.full((1, 1, blocks.n, blocks.n), 8, dtype=torch.uint8)
        plan = plan_of_levels(level, blocks, blocks, factors=(8,))
        out = attend(q, q, v, plan, backend="reference").out
        torch.testing.assert_close(out, torch.full_like(out, 1 / 897), rtol=1e-9, atol=0)

    def test_rows_that_skip_everything_are_zero(self):
        """S11."""
        q, k, v = doubles("image")
        cut = frame_of(LAYOUTS["image"], 64)
        level = torch.full((1, 1, cut.blocks.n, cut.blocks.n), 4, dtype=torch.uint8)
        level[:, :, 1] = 0
        plan = check(plan_of_levels(level, cut.blocks, cut.blocks, factors=(4,)))
        out, lse = attend(q, k, v, plan, backend="reference")
        assert not out[:, :, 64:128].any()
        assert bool((lse[:, :, 64:128] == -torch.inf).all())


class TestSelection:
    @pytest.mark.parametrize("importance", ["sampled", "means"])
    def test_as_many_of_each_level_as_the_ends_say(self, importance: str):
        q, k, _ = qkv("image")
        method = PsaMethod(ends=(0.25, 0.5, 0.5, 0.75), importance=importance, block=64)
        level = levels_of(method.plan(q, k, CallContext(LAYOUTS["image"])))
        for factor, count in ((1, 1), (2, 1), (4, 0), (8, 1), (0, 1)):
            assert bool(((level == factor).sum(-1) == count).all())

    @pytest.mark.parametrize("value", [torch.inf, torch.nan])
    def test_means_that_are_no_numbers_hide_no_blocks(self, value: float):
        """Ends of all blocks read all of them, those last."""
        q, k, _ = qkv("image")
        k[:, :, 7, 0] = value  # scores of either sign, by the queries
        method = PsaMethod(ends=(0.25, 0.5, 0.75, 1.0), importance="means", block=64)
        level = levels_of(method.plan(q, k, CallContext(LAYOUTS["image"])))
        assert bool((level > 0).all())

    def test_skipped_blocks_as_means_are_a_tail(self):
        q, k, v = doubles("image")
        plan = PsaMethod(ends=(0.25, 0.5, 0.5, 0.5), skipped="mean", block=64).plan(
            q, k, CallContext(LAYOUTS["image"])
        )
        assert plan.tail == "zeroth"
        level = levels_of(plan)
        cut = frame_of(LAYOUTS["image"], 64, "hilbert")
        expected = repeated(level.masked_fill(level == 0, 64), cut, q, k, v)
        got = attend(q, k, v, plan, backend="reference").out
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)

    def test_the_similarity_cap(self):
        """S9, through the method: a cap only ever makes levels finer."""
        q, k, _ = qkv("image")
        ends = (0.25, 0.5, 0.75, 1.0)
        context = CallContext(LAYOUTS["image"])

        def level(similarity: tuple[float, ...] | None) -> Tensor:
            method = PsaMethod(ends=ends, similarity=similarity, block=64)
            return levels_of(method.plan(q, k, context))

        free = level(None)
        assert bool((level((1.0, 1.0, 1.0)) == 1).all())
        assert torch.equal(level((0.0, 0.0, -1.0)), free)
        assert bool((level((0.0, 0.0, 0.1)) <= free).all())

    def test_samples_differ_between_steps_and_layers_and_not_between_runs(self):
        q, k, _ = qkv("image")
        method = PsaMethod(ends=(0.25, 0.5, 0.5, 0.5), block=64)
        contexts = [
            CallContext(LAYOUTS["image"], layer=layer, layers=9, step=step)
            for layer, step in ((0, 0), (0, 0), (0, 1), (1, 0))
        ]
        plans = [levels_of(method.plan(q, k, context)) for context in contexts]
        assert torch.equal(plans[0], plans[1])
        assert not torch.equal(plans[0], plans[2])
        assert not torch.equal(plans[0], plans[3])

    @pytest.mark.parametrize("order", ["raster", "tile", "hilbert"])
    def test_forced_blocks_are_exact(self, order: str):
        q, k, _ = qkv("image")
        method = PsaMethod(ends=(0.0, 0.0, 0.0, 0.5), forced=("self",), order=order, block=64)
        level = levels_of(method.plan(q, k, CallContext(LAYOUTS["image"])))
        assert bool((level.diagonal(dim1=-2, dim2=-1) == 1).all())

    def test_text_is_exact_both_ways(self):
        q, k, _ = qkv("text")
        method = PsaMethod(ends=(0.0, 0.0, 0.0, 1.0), block=64)
        level = levels_of(method.plan(q, k, CallContext(LAYOUTS["text"])))
        context = frame_of(LAYOUTS["text"], 64, "hilbert").context
        assert bool((level[..., context, :] == 1).all())
        assert bool((level[..., context] == 1).all())
        assert bool((level[..., ~context, :][..., ~context] == 8).all())


def test_a_share_of_the_tokens_is_sampled(monkeypatch: pytest.MonkeyPatch):
    q, k, _ = qkv("image")
    seen = []

    def noted(*args: object, share: int, **kwargs: object) -> torch.Tensor:
        seen.append(share)
        return sampled_importance(*args, share=share, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("dit_sparse.methods.psa.sampled_importance", noted)
    for share in (4, 16, None):
        PsaMethod(block=64, share=share).plan(q, k, CallContext(LAYOUTS["image"]))
    assert seen == [4, 16, 4]


@pytest.mark.parametrize(("width", "share"), [(256, 4), (257, 8)])
def test_long_sequences_are_sampled_less(monkeypatch: pytest.MonkeyPatch, width: int, share: int):
    layout = TokenLayout.of(TokenGrid(1, 256, width))
    seen = []

    def noted(q: torch.Tensor, k: torch.Tensor, frame: Frame, **named: Any) -> torch.Tensor:
        seen.append(named["share"])
        return torch.rand(1, 1, frame.blocks.n, frame.blocks.n)

    monkeypatch.setattr("dit_sparse.methods.psa.sampled_importance", noted)
    x = torch.zeros(1, 1, layout.length, 8)
    PsaMethod().plan(x, x, CallContext(layout))
    assert seen == [share]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ends": (0.1, 0.2, 0.3)}, "ends as four shares"),
        ({"ends": (0.3, 0.2, 0.4, 0.5)}, r"ascending ends, got \(0.3, 0.2, 0.4, 0.5\)"),
        ({"ends": (0.3, 0.4, 0.5, 1.5)}, "ends from 0 to 1"),
        ({"ends": (-0.1, 0.4, 0.5, 0.6)}, "ends from 0 to 1"),
        ({"ends": (0.0, 0.0, 0.0, 0.0)}, "the last one above 0"),
        ({"ends": (0.1, 0.2, float("nan"), 0.5)}, "ascending ends|ends from 0 to 1"),
        ({"ends": 0.5}, "ends as four shares"),
        ({"allocation": "topk"}, "allocation among quantile, mass, got 'topk'"),
        ({"norm": "none"}, "norm among softmax, max"),
        ({"share": 3}, "no share or a power of two from 1 to 64, got share=3"),
        ({"share": True}, "no share or a power of two from 1 to 64, got share=True"),
        ({"importance": "all"}, "importance among sampled, means"),
        ({"similarity": (0.5, 0.5)}, "similarity as three cosines"),
        ({"similarity": (0.5, 0.5, 2.0)}, "similarity as three cosines"),
        ({"skipped": "pool"}, "skipped among drop, mean"),
        ({"block": 96}, "block of 64 or 128"),
        ({"order": "gilbert"}, "order among raster"),
        ({"reuse_steps": 1.5}, "reuse_steps of at least 1"),
        ({"least": -1}, "least as a number of blocks"),
        ({"forced": ("sink",)}, "forced as a tuple of names among self"),
    ],
)
def test_bad_options(options: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        PsaMethod(**options)


def test_names_of_forced_blocks_become_a_tuple():
    """Methods are keys of plans, and JSON has lists alone."""
    method = PsaMethod(forced=["self"])
    assert {method: 1} == {PsaMethod(forced=("self",)): 1}


def test_ends_of_less_than_one_block():
    q, k, _ = qkv("image")
    method = PsaMethod(ends=(0.0, 0.0, 0.1, 0.2), block=64)
    with pytest.raises(ValueError, match=r"at least 0\.25 for 4 key blocks of 64 tokens"):
        method.plan(q, k, CallContext(LAYOUTS["image"]))


def test_least():
    q, k, _ = qkv("image")
    for least, count in ((1, 1), (3, 3), (99, 4)):
        method = PsaMethod(ends=(0.0, 0.0, 0.1, 0.2), least=least, block=64)
        level = levels_of(method.plan(q, k, CallContext(LAYOUTS["image"])))
        assert bool(((level == 1).sum(-1) == count).all())
