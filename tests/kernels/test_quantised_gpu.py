"""The 8-bit kernel at real sizes, on a Hopper GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dit_sparse.attention import attend
from dit_sparse.kernels.emulated import EmulatedBackend
from tests.block_cases import Case, plan_of, tensors_of
from tests.oracle import masked_attention

pytest.importorskip("dit_sparse.kernels.quantised")
hopper = pytest.importorskip("dit_sparse.kernels.hopper")

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
LEAST = {"fp8": 0.997, "int8": 0.999}
CASES = [
    Case(128, 128, 128, torch.bfloat16, box=False, tokens=2304),
    Case(128, 128, 128, torch.bfloat16, box=False, order="head", tokens=2304),
    Case(128, 128, 128, torch.bfloat16, tokens=2304),
    Case(128, 128, 128, torch.bfloat16, order="head", tokens=2304),
    Case(128, 128, 128, torch.bfloat16, ragged=False, box=False, order="shared", tokens=2304),
    Case(96, 128, 128, torch.float16, box=False, tokens=2304),
]


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("precision", LEAST)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_near_float64_and_its_meaning(case: Case, precision: Any):
    plan = plan_of(case).to("cuda")
    q, k, v = tensors_of(case, plan, "cuda")
    if case.box and not hopper.masks(q):
        pytest.skip("the table leaves masked entries to others")
    k[..., 3] += 5
    v[..., 2] += 3
    got = attend(q, k, v, plan, precision=precision)
    out, lse = masked_attention(q, k, v, plan.to_mask())
    seen = lse > -torch.inf
    assert torch.equal(got.lse > -torch.inf, seen)
    assert not got.out[~seen].any()
    similar = F.cosine_similarity(got.out[seen].double(), out[seen], dim=-1)
    assert similar.mean() >= LEAST[precision]
    emulated = attend(q, k, v, plan, backend=EmulatedBackend(precision))
    assert (got.lse[seen] - lse[seen]).abs().max() < 0.3
    assert (got.lse[seen] - lse[seen]).abs().mean() < 2 * (emulated.lse - lse)[seen].abs().mean()
    errors = [float((x.out[seen].double() - out[seen]).norm()) for x in (got, emulated)]
    assert errors[0] < 1.5 * errors[1]
    again = attend(q, k, v, plan, precision=precision)
    assert torch.equal(again.out, got.out)
    assert torch.equal(again.lse, got.lse)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("precision", LEAST)
@pytest.mark.parametrize("box", [False, True])
def test_the_longest_lists_first_change_nothing(box: bool, precision: Any):
    case = Case(128, 128, 128, torch.bfloat16, box=box, order="head", tokens=2304)
    plan = plan_of(case).to("cuda")
    q, k, v = tensors_of(case, plan, "cuda")
    if box and not hopper.masks(q):
        pytest.skip("the table leaves masked entries to others")
    plain, longest = (
        attend(q, k, v, replace(plan, uneven=uneven), precision=precision)
        for uneven in (False, True)
    )
    assert torch.equal(plain.out, longest.out)
    assert torch.equal(plain.lse, longest.lse)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
def test_masked_entries_run_only_where_the_table_trusts_the_kernel():
    case = Case(128, 128, 128, torch.bfloat16, tokens=2304)
    plan = plan_of(case).to("cuda")
    q, k, v = tensors_of(case, plan, "cuda")
    if hopper.masks(q):
        pytest.skip("the table trusts it")
    with pytest.raises(ValueError, match=r"triton fp8: expected a plan without masked entries"):
        attend(q, k, v, plan, precision="fp8")


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
def test_head_dim_64_is_refused():
    case = Case(64, 128, 128, torch.bfloat16)
    plan = plan_of(case).to("cuda")
    q, k, v = tensors_of(case, plan, "cuda")
    with pytest.raises(ValueError, match="triton fp8: expected one head dim from 65 to 128"):
        attend(q, k, v, plan, precision="fp8")
