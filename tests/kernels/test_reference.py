"""The reference backend against the definition in float64, and against what must hold anyway."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_sparse.attention import attend
from dit_sparse.backend import AttentionOutput, Backend
from dit_sparse.grid import Permutation
from dit_sparse.kernels.reference import BACKEND
from dit_sparse.levels import plan_of_levels
from dit_sparse.plan import BlockPlan, Blocks
from tests.oracle import masked_attention, planned_attention
from tests.problems import Boxes, Problem, pooled_plans, problems

HEADS = 3
DTYPES = {torch.float32: 1e-5, torch.float64: 1e-12}

precisions = st.sampled_from(sorted(DTYPES, key=str))


def tensors(
    plan: BlockPlan, dtype: torch.dtype = torch.float32, dim: int = 5, heads: int = HEADS
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v of a batch that the plan accepts."""
    generator = torch.Generator().manual_seed(plan.q_blocks.total)
    batch = max(2, plan.offsets.shape[0])
    lengths = (plan.q_blocks.total, plan.k_blocks.total, plan.k_blocks.total)
    q, k, v = (
        torch.randn(batch, heads, n, dim, generator=generator, dtype=torch.float64).to(dtype)
        for n in lengths
    )
    return q, k, v


def run(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float | None = None):
    return attend(q, k, v, plan, scale=scale, backend="reference")


def assert_equal(got: AttentionOutput, expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    out, lse = expected
    assert got.lse.dtype == torch.float32
    torch.testing.assert_close(got.out.double(), out.double(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.lse.double(), lse.double(), rtol=1e-5, atol=1e-5)


def random_plan(seed: int, blocks: Blocks, heads: int = HEADS, share: float = 0.5) -> BlockPlan:
    visited = random_mask(seed, blocks, heads, share)
    return BlockPlan.from_mask(visited, blocks, blocks)


def random_mask(seed: int, blocks: Blocks, heads: int = HEADS, share: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, heads, blocks.n, blocks.n, generator=generator) < share


def whole_plan(blocks: Blocks) -> BlockPlan:
    every = torch.ones(1, 1, blocks.n, blocks.n, dtype=torch.bool)
    return BlockPlan.from_mask(every, blocks, blocks)


class TestAgainstTheDefinition:
    @given(problems(), precisions)
    def test_exact_entries(self, problem: Problem, dtype: torch.dtype):
        q, k, v = tensors(problem.plan, dtype)
        expected = masked_attention(q, k, v, problem.expected)
        assert_equal(run(q, k, v, problem.plan), expected, DTYPES[dtype])

    @settings(max_examples=60)
    @given(pooled_plans(), precisions)
    def test_pooled_entries_and_tails(self, plan: BlockPlan, dtype: torch.dtype):
        q, k, v = tensors(plan, dtype)
        assert_equal(run(q, k, v, plan), planned_attention(q, k, v, plan), DTYPES[dtype])

    @settings(max_examples=20)
    @given(problems())
    def test_both_definitions_agree(self, problem: Problem):
        q, k, v = tensors(problem.plan)
        by_list = planned_attention(q, k, v, problem.plan)
        by_mask = masked_attention(q, k, v, problem.expected)
        torch.testing.assert_close(by_list, by_mask, rtol=1e-12, atol=1e-12)

    @given(problems(), st.sampled_from([0.01, 1.0, 3.0]))
    def test_scale(self, problem: Problem, scale: float):
        q, k, v = tensors(problem.plan)
        expected = masked_attention(q, k, v, problem.expected, scale)
        assert_equal(run(q, k, v, problem.plan, scale), expected, 2e-5)

    @pytest.mark.parametrize("factor", [2, 4, 8, 16, 32, 64, 128])
    @pytest.mark.parametrize("tail", ["none", "zeroth", "first", "block"])
    def test_every_factor(self, factor: int, tail: str):
        blocks = Blocks.of_runs([40, 130, 1], 128)
        level = random_mask(1, blocks, heads=1, share=0.6).to(torch.uint8) * factor
        plan = plan_of_levels(level, blocks, blocks, factors=(factor,), tail=tail)
        # Some queries are enough for the token-by-token oracle.
        few = replace(plan, q_blocks=Blocks.of_runs([2, 1, 1, 1], 2))
        q, k, v = tensors(few, heads=1)
        assert_equal(run(q, k, v, few), planned_attention(q, k, v, few), 1e-5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_rounds_only_the_result(self, dtype: torch.dtype):
        plan = random_plan(3, Blocks.of_runs([9, 20], 8))
        q, k, v = tensors(plan, dtype)
        wide = run(q.float(), k.float(), v.float(), plan)
        got = run(q, k, v, plan)
        assert got.out.dtype == dtype
        assert torch.equal(got.out, wide.out.to(dtype))
        assert torch.equal(got.lse, wide.lse)


class TestIdentities:
    @given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.sampled_from([4, 16]))
    def test_all_blocks_are_dense_attention(self, runs: list[int], size: int):
        plan = whole_plan(Blocks.of_runs(runs, size))
        q, k, v = tensors(plan)
        got = run(q, k, v, plan).out
        torch.testing.assert_close(
            got, F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-5
        )

    @pytest.mark.parametrize("per_head", [False, True])
    def test_an_order_is_a_permutation_by_hand(self, per_head: bool):
        plan = random_plan(5, Blocks.of_runs([7, 11, 2], 4))
        rows = [torch.randperm(20) for _ in range(HEADS)]
        order = Permutation(torch.stack(rows) if per_head else rows[0])
        q, k, v = tensors(plan)
        got = run(q, k, v, replace(plan, order=order))
        for head in range(HEADS):
            index = rows[head] if per_head else rows[0]
            by_hand = run(*(x[:, :, index] for x in (q, k, v)), plan)
            assert torch.equal(got.out[:, head, index], by_hand.out[:, head])
            assert torch.equal(got.lse[:, head, index], by_hand.lse[:, head])

    @settings(max_examples=30)
    @given(pooled_plans())
    def test_equal_values_come_out_again(self, plan: BlockPlan):
        q, k, v = tensors(plan)
        v = torch.ones_like(v) * torch.arange(1.0, 6.0)
        out, lse = run(q, k, v, plan)
        seen = lse > -torch.inf
        # First-order tails see v weighed by centred keys, which sum to nothing in every block.
        torch.testing.assert_close(
            out[seen], v[:, :, :1].expand_as(out)[seen], rtol=1e-5, atol=1e-5
        )
        assert not out[~seen].any()

    @pytest.mark.parametrize("tail", ["zeroth", "first", "block"])
    @pytest.mark.parametrize("runs", [[32], [3, 9, 1, 5]])
    def test_a_tail_is_exact_for_keys_constant_in_each_block(self, tail: str, runs: list[int]):
        blocks = Blocks.of_runs(runs, 8)
        plan = replace(random_plan(7, blocks, share=0.4), tail=tail)
        q, k, v = tensors(plan, torch.float64)
        k = k[:, :, blocks.starts[:-1].long()].repeat_interleave(blocks.lengths, dim=2)
        assert_equal(run(q, k, v, plan), masked_attention(q, k, v), 1e-12)

    def test_pooled_entries_are_exact_for_keys_constant_in_each_pool(self):
        blocks = Blocks.of_runs([30, 13], 16)
        every = torch.full((1, 1, blocks.n, blocks.n), 4, dtype=torch.uint8)
        plan = plan_of_levels(every, blocks, blocks, factors=(4,))
        q, k, v = tensors(plan, torch.float64)
        within = torch.arange(43) - blocks.starts[blocks.of_token]
        k = k[:, :, torch.arange(43) - within % 4]
        assert_equal(run(q, k, v, plan), masked_attention(q, k, v), 1e-12)

    def test_the_first_order_term_is_exact_for_equal_covariances(self):
        """With one block every block has the average covariance; with small scores Taylor holds."""
        blocks = Blocks.uniform(24, 8)
        plan = replace(random_plan(0, blocks, share=0.0), tail="first")
        q, k, v = tensors(plan, torch.float64)
        block = k[:, :, :8] - k[:, :, :8].mean(2, keepdim=True)
        k = block.repeat(1, 1, 3, 1) + 0.1 * k[:, :, ::8].repeat_interleave(8, dim=2)
        v = v[:, :, :8].repeat(1, 1, 3, 1)
        errors = {}
        for tail in ("zeroth", "first"):
            for small in (1e-2, 1e-3):
                out = run(q, k, v, replace(plan, tail=tail), small).out
                exact = masked_attention(q, k, v, scale=small)[0]
                errors[tail, small] = float((out - exact).norm() / exact.norm())
        assert errors["zeroth", 1e-2] / errors["zeroth", 1e-3] == pytest.approx(10, rel=0.2)
        assert errors["first", 1e-2] / errors["first", 1e-3] == pytest.approx(100, rel=0.2)

    @given(st.integers(0, 1000))
    def test_parts_merge_by_their_lse(self, seed: int):
        blocks = Blocks.of_runs([5, 9, 2], 4)
        visited, left = random_mask(seed, blocks), random_mask(seed + 1, blocks)
        whole, *parts = (
            BlockPlan.from_mask(mask, blocks, blocks)
            for mask in (visited, visited & left, visited & ~left)
        )
        q, k, v = tensors(whole, torch.float64)
        expected = run(q, k, v, whole)
        out = [run(q, k, v, part) for part in parts]
        lse = torch.stack([o.lse for o in out]).double()
        share = lse.softmax(0).nan_to_num()[..., None]
        merged = share[0] * out[0].out + share[1] * out[1].out
        assert_equal(expected, (merged, lse.logsumexp(0)), 1e-6)

    @given(st.integers(0, 1000))
    def test_batch_entries_and_heads_do_not_meet(self, seed: int):
        plan = random_plan(seed, Blocks.of_runs([6, 10], 4))
        q, k, v = tensors(plan)
        whole = run(q, k, v, plan)
        for b in range(2):
            for h in range(HEADS):
                lists = {
                    name: getattr(plan, name)[b : b + 1, h : h + 1]
                    for name in ("offsets", "full", "partial")
                }
                one = run(*(x[b : b + 1, h : h + 1] for x in (q, k, v)), replace(plan, **lists))
                torch.testing.assert_close(one.out[0, 0], whole.out[b, h])
                torch.testing.assert_close(one.lse[0, 0], whole.lse[b, h])


class TestEdges:
    @pytest.mark.parametrize("with_box", [False, True])
    def test_rows_without_keys(self, with_box: bool):
        blocks = Blocks.of_runs([5, 3], 4)
        visited = torch.zeros(1, 1, blocks.n, blocks.n, dtype=torch.bool)
        visited[0, 0, 0] = with_box
        box = Boxes.random((3,), 1, 8, 8, seed=0)
        box = replace(box, low=box.low * 0 + 7, high=box.high * 0, text=box.text & False)
        plan = BlockPlan.from_mask(
            visited,
            blocks,
            blocks,
            full=torch.zeros_like(visited) if with_box else None,
            box=box.packed() if with_box else None,
        )
        out, lse = run(*tensors(plan), plan)
        assert not out.any()
        assert bool((lse == -torch.inf).all())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("tail", ["none", "zeroth"])
    def test_extreme_scores(self, dtype: torch.dtype, tail: str):
        plan = replace(random_plan(11, Blocks.of_runs([6, 5], 4)), tail=tail)
        q, k, v = tensors(plan, dtype)
        q, k = q.sign() * 2e3, k.sign()  # scores up to 5 * 2e3 = 1e4
        out, lse = run(q, k, v, plan, 1.0)
        assert bool(out.isfinite().all())
        assert not bool(lse.isnan().any())
        # A bias of ln(count) added to a score of 1e4 is known to 5e-4 in fp32.
        in_float = 1e-5 if tail == "none" else 1e-3
        tolerance = in_float if dtype == torch.float32 else 1e-12
        expected = planned_attention(q, k, v, plan, 1.0)
        assert_equal(AttentionOutput(out, lse), expected, tolerance)

    @pytest.mark.parametrize("tail", ["none", "zeroth", "first", "block"])
    def test_a_hidden_block_behind_a_short_one_is_not_looked_at(self, tail: str):
        blocks = Blocks.of_runs([10, 3, 8, 8], 8)
        hidden = torch.arange(blocks.n)[None] == 3
        listed = torch.arange(blocks.n).expand(1, 1, blocks.n, -1) == 0
        plan = replace(BlockPlan.from_mask(listed, blocks, blocks, tail=tail), hidden=hidden)
        q, k, v = tensors(plan)
        unseen = hidden[0, blocks.of_token][:, None]
        clean = run(q, k.masked_fill(unseen, 0), v.masked_fill(unseen, 0), plan)
        for nan in ((k.masked_fill(unseen, torch.nan), v), (k, v.masked_fill(unseen, torch.nan))):
            torch.testing.assert_close(run(q, *nan, plan).out, clean.out)

    def test_queries_and_keys_of_other_lengths(self):
        q_blocks, k_blocks = Blocks.of_runs([3, 8], 4), Blocks.of_runs([20, 1], 8)
        visited = torch.rand(1, HEADS, q_blocks.n, k_blocks.n) < 0.6
        plan = BlockPlan.from_mask(visited, q_blocks, k_blocks)
        q, k, v = tensors(plan)
        assert_equal(run(q, k, v, plan), masked_attention(q, k, v, plan.to_mask()), 1e-5)

    def test_it_is_a_backend_that_never_refuses(self):
        assert isinstance(BACKEND, Backend)
        plan = whole_plan(Blocks.uniform(4, 4))
        assert BACKEND.refuses(*tensors(plan), plan) is None
