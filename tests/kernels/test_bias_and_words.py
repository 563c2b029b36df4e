"""Entries with a bias, and partial ones masked by words, against float64 one query at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.attention import attend, select_backend
from dit_sparse.kernels.emulated import EmulatedBackend
from dit_sparse.plan import BlockPlan
from dit_sparse.plan_check import check
from dit_sparse.plan_io import load_plan, save_plan
from tests.block_cases import Case, plan_of, tensors_of
from tests.oracle import masked_attention, planned_attention
from tests.problems import pooled_plans

LOOSE = {"rtol": 1e-5, "atol": 1e-5}
CASES = [
    Case(16, 16, 64, box=True, order="head", tile="small"),
    Case(16, 16, 64, box=True, ragged=False, lists="head", tile="whole"),
    Case(16, 32, 16, box=True, order="shared", lists="shared", tile="whole"),
]


def marked(plan: BlockPlan, *, bias: bool, words: bool, seed: int = 0) -> BlockPlan:
    """The plan with random biases, some of them -inf, and with random words in place of its box."""
    generator = torch.Generator().manual_seed(seed)
    entries = plan.indices.numel()
    if words:
        shape = (entries, -(-plan.k_blocks.size // 32))
        bits = torch.randint(-(2**31), 2**31, shape, generator=generator).int()
        plan = replace(plan, box=None, words=bits)
    if bias:
        biases = 3 * torch.randn(entries, generator=generator)
        nothing = torch.rand(entries, generator=generator) < 0.1
        plan = replace(plan, bias=biases.masked_fill(nothing, -torch.inf))
    return check(plan)


@pytest.fixture
def plan() -> BlockPlan:
    return marked(plan_of(CASES[0]), bias=True, words=True)


@given(pooled_plans(), st.booleans(), st.booleans(), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_the_reference(plan: BlockPlan, bias: bool, words: bool, seed: int):
    """Beside pooled entries and any tail, which have neither."""
    plan = marked(plan, bias=bias, words=words and plan.box is not None, seed=seed)
    batch, total = max(1, plan.batch), plan.q_blocks.total
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, 3, total, 4, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    got = attend(q, k, v, plan, backend="reference")
    out, lse = planned_attention(q, k, v, plan)
    torch.testing.assert_close(got.out, out, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.lse.double(), lse, **LOOSE)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("bias", "words"), [(True, False), (False, True), (True, True)])
def test_the_portable_kernel(case: Case, bias: bool, words: bool):
    block_sparse = pytest.importorskip("dit_sparse.kernels.block_sparse")
    tiles = pytest.importorskip("dit_sparse.kernels.tiles")
    if torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    plan = marked(plan_of(case), bias=bias, words=words)
    q, k, v = tensors_of(case, plan)
    tile = tiles.Tile(case.tile_keys, warps=4, stages=1, tma=False, queries=64)
    backend: Any = block_sparse.TritonBackend(tile=tile, interpreted=True)
    got = attend(q, k, v, plan, backend=backend)
    out, lse = planned_attention(q, k, v, plan)
    torch.testing.assert_close(got.out.double(), out, **LOOSE)
    torch.testing.assert_close(got.lse.double(), lse, **LOOSE)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_portable_kernel_on_a_gpu(head_dim: int):
    case = Case(head_dim, 128, 128, torch.bfloat16, order="head", tokens=2304)
    cpu = marked(plan_of(case), bias=False, words=True)
    plan = cpu.to("cuda")
    q, k, v = tensors_of(case, plan, "cuda")
    backend, refusals = select_backend(q, k, v, plan)
    assert (backend.name, refusals) == ("triton", ())
    got = attend(q, k, v, plan, backend=backend)
    out, lse = masked_attention(q, k, v, plan.to_mask())
    seen = lse > -torch.inf
    assert float((got.out.double() - out)[seen].norm() / out[seen].norm()) <= 1e-2
    torch.testing.assert_close(got.lse.double()[seen], lse[seen], rtol=1e-6, atol=1e-3)
    # The same bias for all entries alters the mass alone.
    shifted = replace(plan, bias=torch.full_like(plan.indices, 2, dtype=torch.float32))
    again = attend(q, k, v, shifted, backend=backend)
    torch.testing.assert_close(again.lse[seen], got.lse[seen] + 2, rtol=0, atol=1e-4)
    torch.testing.assert_close(again.out, got.out, rtol=1e-2, atol=1e-2)


def test_the_mask_of_words(plan: BlockPlan):
    """Bit j % 32 of word j // 32, in the caller's order; the same softmax either way."""
    plan = replace(plan, bias=None)
    q, k, v = (x.double() for x in tensors_of(CASES[0], plan))
    out, lse = masked_attention(q, k, v, plan.to_mask())
    expected, mass = planned_attention(q, k, v, plan)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, mass)


def test_the_emulation_adds_the_bias(plan: BlockPlan):
    q, k, v = tensors_of(CASES[0], plan)
    got = attend(q, k, v, plan, backend=EmulatedBackend("int8"))
    out, lse = planned_attention(q, k, v, plan)
    seen = lse > -torch.inf
    assert float((got.out.double() - out)[seen].norm() / out[seen].norm()) < 0.05
    torch.testing.assert_close(got.lse.double()[seen], lse[seen], rtol=0, atol=0.2)


def test_plans_keep_them(plan: BlockPlan, tmp_path: Path):
    loaded = load_plan(save_plan(plan, tmp_path / "plan.safetensors"))
    assert torch.equal(loaded.bias, plan.bias)
    assert torch.equal(loaded.words, plan.words)
    assert "bias, words" in str(plan)


def test_backends_that_do_not_know_them_refuse(plan: BlockPlan):
    q, k, v = tensors_of(CASES[0], plan)
    flex = pytest.importorskip("dit_sparse.kernels.flex")
    quantised = pytest.importorskip("dit_sparse.kernels.quantised")
    assert "without bias and words" in flex.FlexBackend(eager=True).refuses(q, k, v, plan)
    assert "without bias and words" in quantised.refuses_plan(plan)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"bias": torch.zeros(3)}, "Expected bias of shape"),
        ({"bias": "double"}, "Expected bias of dtype torch.float32"),
        ({"bias": float("inf")}, "Expected a finite bias"),
        ({"bias": float("nan")}, "Expected a finite bias"),
        ({"words": torch.zeros(3, 2, dtype=torch.int32)}, "Expected words of shape"),
        ({"words": "none"}, "Expected a box that masks the partial entries"),
        ({"box": "again"}, "got words and another"),
    ],
)
def test_faults(plan: BlockPlan, changes: dict[str, Any], sentence: str):
    assert plan.bias is not None
    named = {
        "double": plan.bias.double(),
        "none": None,
        "again": plan_of(CASES[0]).box,
    }
    (name, value), *_ = changes.items()
    if isinstance(value, float):
        value = plan.bias.where(plan.indices > 0, value)
    elif not isinstance(value, torch.Tensor):
        value = named[value]
    with pytest.raises(ValueError, match=sentence):
        check(replace(plan, **{name: value}))
