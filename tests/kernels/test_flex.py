"""The FlexAttention backend on the same random plans."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from dit_sparse.attention import attend
from dit_sparse.backend import Backend
from dit_sparse.kernels.flex import BACKEND, FlexBackend, block_mask
from dit_sparse.plan import BlockPlan, Blocks, Pools
from tests.block_cases import Case, covering, plan_of, tensors_of
from tests.oracle import masked_attention
from tests.problems import Boxes, Problem, problems

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

EAGER = FlexBackend(eager=True)
CASES = [
    Case(**values)
    for values in covering(
        {
            "head_dim": [16, 64],
            "q_block": [16, 64, 128],
            "k_block": [32, 64, 128],
            "ragged": [True, False],
            "box": [True, False],
            "order": ["none", "shared", "head"],
            "lists": ["shared", "head", "batch"],
        },
        strength=2,
    )
]


def check(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, backend: Backend) -> None:
    out, lse = attend(q, k, v, plan, backend=backend)
    expected, expected_lse = masked_attention(q, k, v, plan.to_mask())
    assert lse.dtype == torch.float32
    tolerance = 1e-5 if q.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=tolerance / 10)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kind_of_plan(case: Case):
    plan = plan_of(case)
    check(*tensors_of(case, plan), plan, EAGER)


@settings(max_examples=40)
@given(problems())
def test_random_plans(problem: Problem):
    plan = problem.plan
    batch, heads, total = max(2, problem.expected.shape[0]), 3, plan.q_blocks.total
    generator = torch.Generator().manual_seed(total)
    q, k, v = (torch.randn(batch, heads, total, 8, generator=generator) for _ in range(3))
    check(q, k, v, plan, EAGER)


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_block_lists(seed: int, box: bool):
    """Compiled flex skips and spares the mask by these lists; eager flex ignores them."""
    generator = torch.Generator().manual_seed(seed)
    q_blocks, k_blocks = Blocks.of_runs([200, 301, 77], 64), Blocks.of_runs([301, 277], 128)
    shape = (2, 2, q_blocks.n, k_blocks.n)
    visited = torch.rand(shape, generator=generator) < 0.3
    visited[0, 0, :4] = True
    full = torch.rand(shape, generator=generator) < 0.7 if box else None
    boxes = Boxes.random((2, 3), 1, 578, 578, seed).packed() if box else None
    if full is not None:
        full[0, 0] = True
    plan = BlockPlan.from_mask(visited, q_blocks, k_blocks, full=full, box=boxes)
    mask, seen = block_mask(plan, 2, 2), plan.to_mask()
    size, kinds = mask.BLOCK_SIZE[0], set()
    for b, h, i in itertools.product(range(2), range(2), range(-(-578 // size))):
        whole = mask.full_kv_indices[b, h, i, : mask.full_kv_num_blocks[b, h, i]].tolist()
        masked = mask.kv_indices[b, h, i, : mask.kv_num_blocks[b, h, i]].tolist()
        assert not set(whole) & set(masked)
        for j in range(-(-578 // size)):
            part = seen[b, h, i * size : (i + 1) * size, j * size : (j + 1) * size]
            if j in whole:
                kinds.add("whole")
                assert bool(part.all())
            elif j not in masked:
                kinds.add("skipped")
                assert not part.any()
    assert kinds == {"whole", "skipped"}, "the problem must have both"


class TestRefusals:
    CASE = Case(16, 16, 32)

    def test_a_cpu(self):
        plan = plan_of(self.CASE)
        assert BACKEND.refuses(*tensors_of(self.CASE, plan), plan) == (
            "expected tensors on a GPU, got cpu."
        )
        assert EAGER.refuses(*tensors_of(self.CASE, plan), plan) is None

    def test_float64(self):
        plan = plan_of(self.CASE)
        q, k, v = (x.double() for x in tensors_of(self.CASE, plan))
        with pytest.raises(ValueError, match=r"flex: expected bfloat16, .* got torch.float64"):
            attend(q, k, v, plan, backend=EAGER)

    def test_pooled_entries_and_tails(self):
        plan = plan_of(self.CASE)
        pools = Pools((2,), torch.zeros_like(plan.offsets)[..., None])
        for refused in (replace(plan, pools=pools), replace(plan, tail="first")):
            with pytest.raises(ValueError, match="flex: expected exact entries only"):
                attend(*tensors_of(self.CASE, plan), refused, backend=EAGER)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("order", "lists"), [("none", "shared"), ("head", "batch")])
@pytest.mark.parametrize("box", [False, True])
def test_compiled(head_dim: int, order: str, lists: str, box: bool):
    case = Case(head_dim, 64, 128, torch.bfloat16, box=box, order=order, lists=lists, tokens=1500)
    plan = plan_of(case).to("cuda")
    check(*tensors_of(case, plan, "cuda"), plan, BACKEND)
