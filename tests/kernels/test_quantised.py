"""The backend in 8 bits: what it refuses, who is chosen, and that a pipeline says what ran."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse.attention import attend, backends, prepare, select_backend
from dit_sparse.kernels.emulated import EmulatedBackend
from dit_sparse.methods import create
from dit_sparse.plan import BlockPlan, Blocks
from dit_sparse.session import Session
from tests.block_cases import Case, plan_of

quantised = pytest.importorskip("dit_sparse.kernels.quantised")


def dense(tokens: int, size: int = 128, **options: Any) -> BlockPlan:
    blocks = Blocks.uniform(tokens, size)
    return BlockPlan.from_mask(
        torch.ones(1, 1, blocks.n, blocks.n).bool(), blocks, blocks, **options
    )


def qkv(
    tokens: int = 300, dim: int = 128, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, tokens, dim, generator=generator).to(dtype) for _ in range(3)]


def test_a_cpu_emulates_and_says_so():
    q, k, v = qkv()
    backend, refusals = select_backend(q, k, v, dense(300), precision="fp8")
    assert backend.name == "reference fp8"
    assert refusals == ("triton fp8: expected tensors on a GPU, got cpu.",)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_attend_and_its_repetition_round(precision: Any):
    q, k, v = qkv()
    expected = attend(q, k, v, dense(300), backend=EmulatedBackend(precision))
    got = attend(q, k, v, dense(300), precision=precision)
    assert torch.equal(got.out, expected.out)
    assert not torch.equal(got.out, attend(q, k, v, dense(300)).out)
    first, prepared = prepare(q, k, v, dense(300), precision=precision)
    assert torch.equal(first.out, expected.out)
    assert torch.equal(prepared.again(q, k, v).out, expected.out)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_heads_that_share_keys(precision: Any):
    q, k, v = qkv()
    one, many = (k[:, 1:], v[:, 1:]), (k[:, 1:].expand_as(k), v[:, 1:].expand_as(v))
    expected = attend(q, *many, dense(300), precision=precision)
    out, prepared = prepare(q, *one, dense(300), precision=precision)
    assert torch.equal(out.out, expected.out)
    assert torch.equal(prepared.again(q, *one).out, expected.out)
    assert torch.equal(attend(q, *one, dense(300), precision=precision).out, expected.out)


def test_unknown_precisions_and_backends():
    with pytest.raises(ValueError, match="Expected a precision among bf16, fp8, int8, got 'fp4'"):
        backends("fp4")  # type: ignore[arg-type]
    q, k, v = qkv()
    with pytest.raises(ValueError, match="among triton, reference in fp8, got 'flex'"):
        attend(q, k, v, dense(300), backend="flex", precision="fp8")


def test_on_a_gpu_nothing_is_emulated_unasked(monkeypatch: pytest.MonkeyPatch):
    q, k, v = (x.to("meta") for x in qkv())
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    with pytest.raises(ValueError, match=r"triton fp8: expected bfloat16 or float16") as refused:
        select_backend(q, k, v, dense(300), precision="fp8")
    assert "reference" not in str(refused.value)
    named, _ = select_backend(q, k, v, dense(300), "reference", "fp8")
    assert named.name == "reference fp8"


@pytest.mark.parametrize("dim", [32, 64, 160])
def test_head_dims_that_gain_nothing_are_refused(dim: int):
    q, _, v = qkv(16, dim, torch.bfloat16)
    assert "expected one head dim from 65 to 128 in 8 bits" in quantised.refuses_shapes(q, v)


def test_more_heads_than_a_grid_has_programs():
    q = torch.empty(1, 1, 1, 1, dtype=torch.bfloat16).expand(4096, 16, 1, 128)
    assert "at most 65535 heads of all batch entries" in quantised.refuses_shapes(q, q)


def test_shapes_and_plans_that_run():
    for dim in (65, 96, 128):
        q, _, v = qkv(16, dim, torch.bfloat16)
        assert quantised.refuses_shapes(q, v) is None
    for box in (True, False):
        assert quantised.refuses_plan(plan_of(Case(128, 128, 128, box=box))) is None


@pytest.mark.parametrize("dim", [65, 100, 127])
def test_values_that_no_descriptor_reads_are_refused_in_int8(
    dim: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(quantised.hopper, "runs", lambda *_: True)
    q, k, v = (x.to("meta") for x in qkv(300, dim, torch.bfloat16))
    reasons = {
        name: quantised.QuantisedBackend(name).refuses(q, k, v, dense(300))
        for name in ("fp8", "int8")
    }
    assert reasons["fp8"] is None
    assert "expected a head dim that is a multiple of 8 in int8" in reasons["int8"]


@pytest.mark.parametrize("trusted", [False, True])
def test_masked_entries_are_for_a_kernel_that_the_table_trusts(
    trusted: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(quantised.hopper, "runs", lambda *_: True)
    monkeypatch.setattr(quantised.hopper, "masks", lambda _: trusted)
    q, _k, v = qkv(300, 128, torch.bfloat16)
    plan = plan_of(Case(128, 128, 128))
    assert len(plan.masked_rows) > 0
    reason = quantised._refuses_device(q, v, plan)
    assert reason is None if trusted else "without masked entries" in reason
    assert quantised._refuses_device(q, v, plan_of(Case(128, 128, 128, box=False))) is None


def test_plans_that_are_refused():
    assert quantised.refuses_plan(dense(300, tail="zeroth")) is None
    assert "blocks of 128 tokens" in quantised.refuses_plan(dense(300, 64))


def test_a_copy_of_a_session_keeps_the_precision():
    session = Session(create("dense"), ("a",), precision="int8")
    copy = Session.__new__(Session)
    copy.__setstate__(session.__getstate__())
    assert copy.precision == "int8"
