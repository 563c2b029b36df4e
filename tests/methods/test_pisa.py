"""PISA against the sums of its paper, token by token in float64 (tests T1 to T13)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit_sparse.attention import attend
from dit_sparse.backend import Backend
from dit_sparse.frame import Frame, frame_of
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.levels import plan_of_levels
from dit_sparse.method import CallContext
from dit_sparse.methods.pisa import PisaMethod
from dit_sparse.plan_check import check
from tests.oracle import masked_attention
from tests.selection_cases import LAYOUTS, ordered, qkv, ranges

TAILS = ("zeroth", "first", "block")
all_tails = pytest.mark.parametrize("tail", TAILS)


def run(
    method: PisaMethod,
    layout: TokenLayout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    backend: Backend | str = "reference",
) -> Tensor:
    plan = check(method.plan(q, k, CallContext(layout, values=v)))
    return attend(q, k, v, plan, backend=backend).out


def doubles(layout: str) -> tuple[Tensor, ...]:
    return tuple(x.double() for x in qkv(layout))


def closed_form(method: PisaMethod, layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`num / den` of section 3.2 for the plan's choice, one query block at a time."""
    cut = frame_of(layout, method.block, method.order)
    plan = method.plan(q, k, CallContext(layout, values=v))
    s = q.shape[-1] ** -0.5
    qs, ks, vs = (ordered(x, cut) for x in (q, k, v))
    out = torch.zeros_like(qs)
    for b in range(q.shape[0]):
        blocks = list(enumerate(ranges(cut.blocks)))
        if cut.hidden is not None:
            blocks = [(j, block) for j, block in blocks if not cut.hidden[b, j]]
        total = sum(len(block) for _, block in blocks)
        for h in range(q.shape[1]):
            mean, moment = {}, {}
            for j, block in blocks:
                keys, values = ks[b, h, list(block)], vs[b, h, list(block)]
                mean[j] = keys.mean(0)
                moment[j] = sum(
                    torch.outer(a - mean[j], c) for a, c in zip(keys, values, strict=True)
                )
            average = sum(moment.values())
            for i, rows in enumerate(ranges(cut.blocks)):
                x = qs[b, h, list(rows)]
                num, den = torch.zeros_like(x), torch.zeros(len(rows), 1, dtype=x.dtype)
                for j, block in blocks:
                    keys, values = ks[b, h, list(block)], vs[b, h, list(block)]
                    if plan.visited[b % len(plan.visited), h, i, j]:
                        weight = (s * x @ keys.T).exp()
                        num += weight @ values
                        den += weight.sum(-1, keepdim=True)
                        continue
                    a = (s * x @ mean[j]).exp()[:, None]
                    den += a * len(block)
                    num += a * values.sum(0)
                    if method.tail == "block":
                        num += a * s * (x @ moment[j])
                    elif method.tail == "first":
                        num += a * len(block) / total * s * (x @ average)
                out[b, h, list(rows)] = num / den
    return out if cut.order is None else cut.order.undo(out)


class TestDefinition:
    @all_tails
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_the_sums_of_the_paper(self, layout: str, tail: str):
        q, k, v = doubles(layout)
        method = PisaMethod(tail=tail, block=64)
        expected = closed_form(method, LAYOUTS[layout], q, k, v)
        got = run(method, LAYOUTS[layout], q, k, v)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)

    @all_tails
    @pytest.mark.parametrize("order", ["raster", "tile", "FWH"])
    @pytest.mark.parametrize("options", [{"density": 0.5}, {"mass": 0.7}, {"forced": ("self",)}])
    def test_in_any_order_by_any_rule(self, tail: str, order: str, options: dict):
        q, k, v = doubles("text")
        method = PisaMethod(tail=tail, order=order, block=64, **options)
        expected = closed_form(method, LAYOUTS["text"], q, k, v)
        torch.testing.assert_close(
            run(method, LAYOUTS["text"], q, k, v), expected, rtol=1e-9, atol=1e-9
        )

    @all_tails
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_density_one_is_dense(self, layout: str, tail: str):
        """T1."""
        q, k, v = doubles(layout)
        mask = torch.ones(2, 1, 1, LAYOUTS[layout].length, dtype=torch.bool)
        if LAYOUTS[layout].batch:
            for entry in range(2):
                mask[entry] = False
                for a, b in LAYOUTS[layout].valid_ranges(entry):
                    mask[entry, ..., a:b] = True
        dense = masked_attention(q, k, v, mask)[0]
        got = run(PisaMethod(density=1.0, tail=tail), LAYOUTS[layout], q, k, v)
        torch.testing.assert_close(got, dense, rtol=1e-9, atol=1e-9)


class TestIdentities:
    GRID = TokenLayout.of(TokenGrid(1, 16, 18))

    def tensors(self, dim: int = 8) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(2)
        shape = (1, 2, self.GRID.length, dim)
        return tuple(torch.randn(shape, generator=generator).double() for _ in range(3))

    def frame(self) -> Frame:
        return frame_of(self.GRID, 64, "hilbert")

    @all_tails
    def test_keys_constant_in_blocks_are_exact(self, tail: str):
        """T2, at the lowest density."""
        q, k, v = self.tensors()
        cut = self.frame()
        keys = ordered(k, cut)
        keys = keys[:, :, cut.blocks.starts[:-1].long()].repeat_interleave(cut.blocks.lengths, 2)
        k = cut.order.undo(keys)
        got = run(PisaMethod(tail=tail, block=64, density=0.2), self.GRID, q, k, v)
        torch.testing.assert_close(got, masked_attention(q, k, v)[0], rtol=1e-9, atol=1e-9)

    @all_tails
    def test_constant_values_come_out_again(self, tail: str):
        """T3."""
        q, k, v = self.tensors()
        v = v[:, :, :1].expand_as(v)
        got = run(PisaMethod(tail=tail, block=64), self.GRID, q, k, v)
        torch.testing.assert_close(got, v, rtol=1e-9, atol=1e-9)

    def test_order_of_the_error_in_the_queries(self):
        """T4: proportional to the queries for zeroth and first, to their square for block."""
        q, k, v = self.tensors()
        slope, error = {}, {}
        for tail in TAILS:
            method = PisaMethod(tail=tail, block=64)
            for small in (1e-2, 1e-3):
                exact = masked_attention(small * q, k, v)[0]
                got = run(method, self.GRID, small * q, k, v)
                error[tail, small] = float((got - exact).norm() / exact.norm())
            slope[tail] = math.log10(error[tail, 1e-2] / error[tail, 1e-3])
        assert slope["zeroth"] == pytest.approx(1, abs=0.1)
        assert slope["first"] == pytest.approx(1, abs=0.15)
        assert slope["block"] == pytest.approx(2, abs=0.1)
        assert error["first", 1e-3] < 0.7 * error["zeroth", 1e-3]

    def test_equal_covariances_make_first_and_block_the_same(self):
        """T5: blocks that differ by an offset of their keys have one covariance."""
        q, k, v = (x[:, :, :256] for x in self.tensors())
        layout = TokenLayout.of(TokenGrid(1, 16, 16))
        k = (k[:, :, :64] - k[:, :, :64].mean(2, keepdim=True)).repeat(1, 1, 4, 1)
        k = k + torch.randn(1, 2, 4, 8).double().repeat_interleave(64, 2)
        v = v[:, :, :64].repeat(1, 1, 4, 1)
        out = [
            run(PisaMethod(tail=tail, block=64, order="raster"), layout, q, k, v)
            for tail in ("first", "block")
        ]
        torch.testing.assert_close(*out, rtol=1e-9, atol=1e-9)

    @all_tails
    def test_pairs_may_be_permuted_inside_blocks(self, tail: str):
        """T6."""
        q, k, v = self.tensors()
        cut = self.frame()
        shuffled = torch.cat([torch.randperm(len(b)) + b.start for b in ranges(cut.blocks)])
        k2, v2 = (cut.order.undo(ordered(x, cut)[:, :, shuffled]) for x in (k, v))
        method = PisaMethod(tail=tail, block=64)
        a, b = run(method, self.GRID, q, k, v), run(method, self.GRID, q, k2, v2)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

    def test_the_tail_has_no_more_than_the_true_mass(self):
        """T7, Jensen: so that all mass together is at most the true one."""
        q, k, v = self.tensors()
        plan = PisaMethod(tail="zeroth", block=64).plan(q, k, CallContext(self.GRID))
        lse = attend(q, k, v, plan, backend="reference").lse
        assert bool((lse <= masked_attention(q, k, v)[1] + 1e-5).all())

    @all_tails
    def test_a_common_offset_of_the_keys_changes_nothing(self, tail: str):
        """T10, in float32."""
        q, k, v = (x.float() for x in self.tensors())
        method = PisaMethod(tail=tail, block=64)
        a, b = (run(method, self.GRID, q, key, v) for key in (k, k + 50))
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)

    @pytest.mark.parametrize("density", [0.2, 0.6])
    def test_zeroth_order_is_a_pyramid_of_one_and_the_block(self, density: float):
        """T11."""
        q, k, v = self.tensors()
        method = PisaMethod(tail="zeroth", block=64, density=density)
        plan = method.plan(q, k, CallContext(self.GRID))
        level = torch.where(plan.visited, 1, 64).to(torch.uint8)
        cut = self.frame()
        lists = plan_of_levels(level, cut.blocks, cut.blocks, factors=(64,), order=cut.order)
        a, b = (attend(q, k, v, p, backend="reference") for p in (plan, check(lists)))
        torch.testing.assert_close(a.out, b.out, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(a.lse, b.lse)

    def test_the_error_falls_with_density(self):
        """T13, on keys that are alike in the picture as those of models are."""
        q, k, v = self.tensors()
        smooth = self.frame()
        k = smooth.order.undo(ordered(k, smooth).cumsum(2) / 6)
        exact = masked_attention(q, k, v)[0]
        for tail in TAILS:
            outputs = [
                run(PisaMethod(density=density, tail=tail, block=64), self.GRID, q, k, v)
                for density in (0.2, 0.4, 0.8, 1.0)
            ]
            errors = [float((out - exact).norm()) for out in outputs]
            assert errors == sorted(errors, reverse=True), tail


class TestSelection:
    LAYOUT = LAYOUTS["image"]

    def test_as_many_blocks_as_the_density_says(self):
        q, k, _ = qkv("image")
        for density, count in ((0.25, 1), (0.5, 2), (0.74, 2), (1.0, 4)):
            plan = PisaMethod(density=density, block=64).plan(q, k, CallContext(self.LAYOUT))
            assert bool((plan.count == count).all())

    def test_the_best_blocks_are_read(self):
        q, k, _ = qkv("image")
        cut = frame_of(self.LAYOUT, 64, "hilbert")
        means = [
            torch.stack([ordered(x, cut)[:, :, list(b)].mean(2) for b in ranges(cut.blocks)], 2)
            for x in (q, k)
        ]
        best = (means[0] @ means[1].transpose(-2, -1)).topk(2).indices.sort().values
        plan = PisaMethod(density=0.5, block=64).plan(q, k, CallContext(self.LAYOUT))
        assert torch.equal(plan.indices.view(2, 3, 4, 2).long(), best)

    @pytest.mark.parametrize("prior", ["norm", "deviation"])
    def test_the_prior_raises_blocks_of_large_covariance(self, prior: str):
        q, k, v = qkv("image")
        cut = frame_of(self.LAYOUT, 64, "hilbert")
        loud = cut.order.index[list(ranges(cut.blocks)[2])]
        v[:, :, loud] *= 1e4
        method = PisaMethod(density=0.25, block=64, prior=prior)
        plan = method.plan(q, k, CallContext(self.LAYOUT, values=v))
        assert bool(plan.visited[..., 2].all())
        with pytest.raises(ValueError, match="Expected the values of the call for prior"):
            method.plan(q, k, CallContext(self.LAYOUT))

    @pytest.mark.parametrize("forced", [("self",), ("neighbours",), ("first_frame",)])
    @pytest.mark.parametrize("rule", [{"density": 0.5}, {"mass": 0.3}])
    def test_forced_blocks_are_read(self, forced: tuple[str, ...], rule: dict):
        q, k, _ = qkv("text")
        plan = PisaMethod(forced=forced, block=64, **rule).plan(q, k, CallContext(LAYOUTS["text"]))
        cut = frame_of(LAYOUTS["text"], 64, "hilbert")
        number = torch.arange(cut.blocks.n)
        wanted = {
            "self": number[:, None] == number,
            "neighbours": (number[:, None] - number).abs() <= 1,
            "first_frame": cut.first.expand(cut.blocks.n, -1),
        }[forced[0]]
        assert bool((plan.visited | ~wanted).all())

    def test_forced_blocks_are_part_of_the_density_and_on_top_of_the_mass(self):
        q, k, _ = qkv("image")
        context = CallContext(self.LAYOUT)
        half = PisaMethod(density=0.5, forced=("self",), block=64).plan(q, k, context)
        assert bool((half.count == 2).all())
        free, more = (
            PisaMethod(mass=0.6, forced=forced, block=64).plan(q, k, context).visited
            for forced in ((), ("self",))
        )
        assert torch.equal(more, free | torch.eye(4, dtype=torch.bool))

    def test_rows_follow_mass(self):
        """A query block whose scores are peaked reads less than one whose scores are flat."""
        q, k, _ = qkv("image")
        flat = q * 1e-3
        counts = [
            PisaMethod(mass=0.5, block=64).plan(x, k, CallContext(self.LAYOUT)).count.float().mean()
            for x in (q * 100, flat)
        ]
        assert counts[0] < counts[1]

    def test_grouped_heads(self):
        q, k, v = qkv("image", heads=4)
        for prior in ("none", "norm"):
            method = PisaMethod(density=0.5, block=64, prior=prior)
            few = method.plan(q, k[:, :2], CallContext(self.LAYOUT, values=v[:, :2]))
            many = k[:, :2].repeat_interleave(2, 1), v[:, :2].repeat_interleave(2, 1)
            all_ = method.plan(q, many[0], CallContext(self.LAYOUT, values=many[1]))
            assert torch.equal(few.visited, all_.visited)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"density": 0.0}, "Expected a density above 0 and at most 1, got 0.0"),
        ({"density": float("nan")}, "density above 0"),
        ({"mass": 1.5}, "mass above 0 and at most 1, got 1.5"),
        ({"density": 0.1, "mass": 0.5}, "a density or a mass, got both"),
        ({"tail": "second"}, "tail among none, zeroth, first, block, got 'second'"),
        ({"prior": "raw"}, "prior among none, norm, deviation, got 'raw'"),
        ({"order": "spiral"}, "order among raster"),
        ({"order": "tile", "block": 32}, "block of 64 or 128 tokens, got 32"),
        ({"forced": "self"}, "forced as a tuple of names among self"),
        ({"forced": ("sink",)}, "forced as a tuple of names among self"),
        ({"reuse_steps": 0}, "reuse_steps of at least 1"),
    ],
)
def test_bad_options(options: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        PisaMethod(**options)


def test_names_of_forced_blocks_become_a_tuple():
    """Methods are keys of plans, and JSON has lists alone."""
    method = PisaMethod(forced=["self"])
    assert {method: 1} == {PisaMethod(forced=("self",)): 1}


def test_a_density_of_less_than_one_block():
    q, k, _ = qkv("image")
    with pytest.raises(ValueError, match=r"at least 0.25 for 4 key blocks of 64 tokens, got 0.2\."):
        PisaMethod(density=0.2, block=64).plan(q, k, CallContext(LAYOUTS["image"]))


def test_least():
    q, k, _ = qkv("image")
    context = CallContext(LAYOUTS["image"])
    for least, count in ((1, 1), (3, 3), (99, 4)):
        plan = PisaMethod(density=0.2, least=least, block=64).plan(q, k, context)
        assert bool((plan.count == count).all())
    assert bool((PisaMethod(block=64).plan(q, k, context).count == 1).all())
    with pytest.raises(ValueError, match="least as a number of blocks"):
        PisaMethod(least=-1)
