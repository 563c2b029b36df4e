"""Plans with biases in two: together they are the plan, and each is well-formed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.attention import attend
from dit_sparse.backend import AttentionOutput
from dit_sparse.coarse import one_softmax
from dit_sparse.plan import BlockPlan
from dit_sparse.plan_check import check
from dit_sparse.shares import Shares, any_plain, highest, weighing
from tests.block_cases import Case, plan_of
from tests.problems import pooled_plans


def biased(plan: BlockPlan, seed: int, share: float = 0.5) -> BlockPlan:
    """The plan with a bias for a share of the entries, -inf for some of them."""
    generator = torch.Generator().manual_seed(seed)
    bias = 3 * torch.randn(plan.indices.numel(), generator=generator)
    kind = torch.rand(bias.shape, generator=generator)
    bias = bias.masked_fill(kind >= share, 0.0).masked_fill(kind < 0.2 * share, -torch.inf)
    return check(replace(plan, bias=bias))


def read(plan: BlockPlan) -> AttentionOutput:
    generator = torch.Generator().manual_seed(0)
    shape = (max(1, plan.batch), 3, plan.q_blocks.total, 4)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return attend(q, k, v, plan, backend="reference")


def exact_entries(plan: BlockPlan) -> BlockPlan:
    return replace(plan, pools=None, tail="none", hidden=None)


@given(pooled_plans(), st.booleans(), st.booleans(), st.sampled_from([0.1, 0.5, 1.0]))
@settings(max_examples=60, deadline=None)
def test_the_shares_are_the_plan(plan: BlockPlan, masked: bool, words: bool, share: float):
    if words and plan.box is not None:
        shape = (plan.indices.numel(), -(-plan.k_blocks.size // 32))
        plan = replace(plan, box=None, words=torch.randint(-(2**31), 2**31, shape).int())
        masked = False
    plan = biased(plan, plan.indices.numel(), share)
    shares = Shares.of(plan, masked=masked)
    plain = check(shares.plain)
    assert plain.bias is None
    assert plain.words is None
    assert masked or not bool(plain.partial.any())
    together = read(plain)
    if shares.rest is not None:
        rest = check(shares.rest)
        together = one_softmax(together, read(rest))
        assert bool((rest.full + rest.partial).any())
    expected = read(exact_entries(plan))
    torch.testing.assert_close(together.out, expected.out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(together.lse, expected.lse, rtol=1e-5, atol=1e-5)
    if masked or not words:
        entries = plan.indices.numel()
        zeros = int((plan.bias[replace(plan, pools=None).entries] == 0).sum())
        kept = int((plain.full + plain.partial).sum())
        assert kept == zeros if masked else kept <= zeros <= entries


@given(pooled_plans(), st.booleans(), st.sampled_from([0.1, 0.5, 1.0]))
@settings(max_examples=60, deadline=None)
def test_what_weighs_is_the_plan(plan: BlockPlan, words: bool, share: float):
    assert weighing(plan) is plan
    if words and plan.box is not None:
        shape = (plan.indices.numel(), -(-plan.k_blocks.size // 32))
        plan = replace(plan, box=None, words=torch.randint(-(2**31), 2**31, shape).int())
    plan = biased(plan, plan.indices.numel(), share)
    lists = check(weighing(plan))
    assert weighing(plan) is lists
    assert lists.bias is not None
    assert bool((lists.bias > -torch.inf).all())
    got, expected = read(lists), read(exact_entries(plan))
    torch.testing.assert_close(got.out, expected.out, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.lse, expected.lse)
    rows = torch.cartesian_prod(*map(torch.arange, lists.offsets.shape)).tolist()
    for row in map(tuple, rows):
        first, n = int(lists.offsets[row]), int((lists.full + lists.partial)[row])
        most = max(lists.bias[first : first + n].tolist(), default=0.0)
        assert float(highest(lists)[row]) == most


def test_rows_may_share_entries_in_any_place():
    plan = biased(plan_of(Case(4, 16, 16, box=True)), 0)
    assert plan.bias is not None
    double = replace(
        plan,
        indices=torch.cat([plan.indices.new_zeros(7), plan.indices, plan.indices]),
        bias=torch.cat([plan.bias.new_ones(7), plan.bias, plan.bias]),
        offsets=plan.offsets + 7,
    )
    for masked in (False, True):
        one, two = (Shares.of(p, masked=masked) for p in (plan, double))
        for a, b in ((one.plain, two.plain), (one.rest, two.rest)):
            assert a is not None
            assert b is not None
            for part in ("full", "partial"):
                assert torch.equal(a.listed(part), b.listed(part))
    one, two = weighing(plan), weighing(double)
    assert torch.equal(one.indices, two.indices)
    assert torch.equal(one.bias, two.bias)
    assert torch.equal(highest(plan), highest(double))


def test_the_default_dtype_does_not_matter():
    plan = biased(plan_of(Case(4, 16, 16, box=True)), 0)
    expected = highest(plan)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = highest(plan)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_nothing_is_left_where_no_entry_has_a_bias():
    plan = plan_of(Case(4, 16, 16, box=True))
    plan = replace(plan, bias=torch.zeros(plan.indices.numel()))
    shares = Shares.of(plan, masked=True)
    assert shares.rest is None
    assert torch.equal(shares.plain.indices, plan.indices)
    assert Shares.of(plan, masked=True) is shares
    assert Shares.of(plan, masked=False).rest is not None


@pytest.mark.parametrize("words", [False, True])
def test_whether_an_entry_is_plain(words: bool):
    plan = plan_of(Case(4, 16, 16, box=True))
    entries = plan.indices.numel()
    if words:
        plan = replace(plan, box=None, words=torch.zeros(entries, 1, dtype=torch.int32))
        none = torch.zeros_like(plan.full)
        every = replace(plan, full=none, partial=plan.full + plan.partial)
        assert not any_plain(every)
    assert any_plain(plan)
    assert any_plain(replace(plan, bias=torch.zeros(entries)))
    assert not any_plain(replace(plan, bias=torch.ones(entries)))
