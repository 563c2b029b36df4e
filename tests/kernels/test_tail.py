"""The tail in the specialised kernel, in Triton's interpreter, against the reference in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_sparse.attention import attend
from dit_sparse.backend import AttentionOutput
from dit_sparse.plan import BlockPlan
from dit_sparse.plan_check import check
from tests.block_cases import Case, covering, plan_of, tensors_of

tail = pytest.importorskip("dit_sparse.kernels.tail")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter"),
    pytest.mark.usefixtures("poisoned"),
]

CASES = covering(
    {
        "head_dim": [64, 72, 128],
        "ragged": [True, False],
        "order": ["none", "shared", "head"],
        "lists": ["shared", "head", "batch"],
        "hidden": [True, False],
    },
    strength=2,
)


def exact_entries(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
) -> AttentionOutput:
    only = replace(plan, tail="none", pools=None)
    out, lse = attend(q, k, v, only, scale=scale, backend="reference")
    return AttentionOutput(out, lse)


@pytest.mark.parametrize("values", CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_on_top_of_the_listed_blocks(values: dict):
    options = dict(values)
    with_hidden = options.pop("hidden")
    case = Case(q_block=128, k_block=128, dtype=torch.float16, box=False, **options)
    plan = plan_of(case)
    if with_hidden:
        generator = torch.Generator().manual_seed(3)
        hidden = torch.rand(2, plan.k_blocks.n, generator=generator) < 0.3
        shown = plan.visited & ~hidden[:, None, None]
        plan = replace(
            BlockPlan.from_mask(shown, plan.q_blocks, plan.k_blocks, order=plan.order),
            hidden=hidden,
        )
    plan = check(replace(plan, tail="zeroth"))
    q, k, v = (x.contiguous() for x in tensors_of(case, plan))
    if plan.hidden is not None:  # what padding holds is nobody's concern
        unseen = plan.hidden[:, plan.k_blocks.of_token][:, None, :, None].expand(*k.shape[:3], 1)
        unseen = unseen if plan.order is None else plan.order.undo(unseen)
        k, v = (x.masked_fill(unseen, float("nan")) for x in (k, v))
    scale = case.head_dim**-0.5
    result = exact_entries(q, k, v, plan, scale)
    ordered = (q, k, v) if plan.order is None else tuple(plan.order(x) for x in (q, k, v))
    assert tail.launch(*ordered, plan, scale, result)
    out, lse = attend(q.double(), k.double(), v.double(), plan, backend="reference")
    assert float((result.out.double() - out).norm()) <= 4e-3 * float(out.norm())
    torch.testing.assert_close(result.out.double(), out, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(result.lse, lse, rtol=4e-3, atol=4e-3)
    assert not result.out[lse == -torch.inf].any()
