"""On GPUs that nobody has run the kernels on they must give known answers first."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse import plan_check
from dit_sparse.attention import attend, select_backend
from dit_sparse.backend import AttentionOutput
from dit_sparse.plan import BlockPlan
from dit_sparse.pools import Pools
from tests.block_cases import Case, plan_of, tensors_of

known_answers = pytest.importorskip("dit_sparse.kernels.known_answers")
block_sparse = pytest.importorskip("dit_sparse.kernels.block_sparse")
reference = pytest.importorskip("dit_sparse.kernels.reference")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
BACKEND = block_sparse.TritonBackend(interpreted=True)
CASE = Case(64, 32, 64, order="shared")


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU stands for a GPU that nobody has seen."""
    monkeypatch.setattr(known_answers, "architecture", lambda device: "gfx942")
    known_answers._verdicts.cache_clear()
    yield
    known_answers._verdicts.cache_clear()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[BlockPlan]:
    """Plans that the backend runs."""
    found: list[BlockPlan] = []
    real = block_sparse.TritonBackend.run

    def run(self: Any, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> Any:
        found.append(plan)
        return real(self, q, k, v, plan, scale)

    monkeypatch.setattr(block_sparse.TritonBackend, "run", run)
    return found


def refusal(plan: BlockPlan, case: Case = CASE) -> str | None:
    q, k, v = tensors_of(case, plan)
    return BACKEND.refuses(q, k, v, plan)


def spoil(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """A compiler that makes something else of the portable kernel."""
    portable = block_sparse.portable
    real = portable.launch

    def launch(*arguments: Any, **named: Any) -> Any:
        made, result = real(*arguments, **named), arguments[6]
        change(result)
        return made

    monkeypatch.setattr(portable, "launch", launch)


def test_good_kernels_are_looked_at_once(runs: list[BlockPlan]):
    plan = plan_of(CASE)
    assert refusal(plan) is None
    assert refusal(plan) is None
    (probe,) = runs
    assert probe.q_blocks.ragged
    assert probe.box is not None
    assert probe.order is not None
    assert (probe.q_blocks.size, probe.k_blocks.size) == (32, 64)


def test_other_kinds_of_calls_are_looked_at_too(runs: list[BlockPlan]):
    for case in (CASE, replace(CASE, box=False), replace(CASE, head_dim=32)):
        assert refusal(plan_of(case), case) is None
    assert len(runs) == 3


def test_blocks_that_are_all_whole_are_a_kind_of_their_own(runs: list[BlockPlan]):
    """Short ones are compiled in."""
    for ragged in (True, False):
        case = replace(CASE, ragged=ragged, tokens=640)
        assert refusal(plan_of(case), case) is None
    assert [probe.k_blocks.ragged for probe in runs] == [True, False]


def test_heads_that_share_keys_are_a_kind_of_their_own(runs: list[BlockPlan]):
    case = replace(CASE, order="none")
    plan = plan_of(case)
    q, k, v = tensors_of(case, plan)
    assert BACKEND.refuses(q, k, v, plan) is None
    assert BACKEND.refuses(q, k[:, :1], v[:, :1], plan) is None
    assert len(runs) == 2


def test_the_default_device_and_dtype_do_not_matter():
    plan = plan_of(CASE)
    plan = replace(plan, bias=torch.zeros(plan.indices.shape))
    q, _, v = tensors_of(CASE, plan)
    kind = known_answers.Kind.of(BACKEND, q, v, plan)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            made, *tensors = known_answers._problem(kind)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {x.device.type for x in (made.indices, made.bias, *tensors)} == {"cpu"}
    assert made.bias.dtype == torch.float32


def test_too_little_memory_says_nothing_of_the_kernels(monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(block_sparse.portable, "launch", full)
        with pytest.raises(torch.OutOfMemoryError):
            refusal(plan_of(CASE))
    assert refusal(plan_of(CASE)) is None


def test_keys_at_low_resolution_are_asked_for_too(monkeypatch: pytest.MonkeyPatch):
    plan = plan_of(CASE)
    asked: list[BlockPlan] = []

    def refusal_of(backend: Any, q: Tensor, v: Tensor, plan: BlockPlan) -> None:
        asked.append(plan)

    monkeypatch.setattr(known_answers, "refusal", refusal_of)
    inner = plan_of(replace(CASE, box=False))
    plan = replace(plan, coarse=SimpleNamespace(plan=inner))
    assert refusal(plan) is None
    assert asked == [plan, inner]


@pytest.mark.parametrize(
    "change",
    [
        lambda result: result.out.mul_(1.05),
        lambda result: result.out[..., 0, :].fill_(torch.nan),
        lambda result: result.lse.add_(0.01),
        lambda result: result.lse[..., 7].fill_(-torch.inf),
        lambda result: result.lse.nan_to_num_(neginf=0.0),
    ],
    ids=["scaled", "NaN", "mass", "a row lost", "a row made up"],
)
def test_broken_kernels_are_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, change: Any
):
    spoil(monkeypatch, change)
    plan = plan_of(CASE)
    with caplog.at_level(logging.WARNING, "dit_sparse"):
        reason, again = refusal(plan), refusal(plan)
    assert reason is not None
    assert reason == again
    assert "known answers on gfx942 (Triton" in reason
    assert len(caplog.records) == 1
    assert reason in caplog.text


def test_attention_goes_to_another_backend(monkeypatch: pytest.MonkeyPatch):
    spoil(monkeypatch, lambda result: result.out.zero_())
    known = (BACKEND, reference.BACKEND)
    monkeypatch.setattr("dit_sparse.attention.backends", lambda precision="bf16": known)
    plan = plan_of(CASE)
    q, k, v = tensors_of(CASE, plan)
    chosen, refusals = select_backend(q, k, v, plan)
    assert chosen.name != "triton"
    assert refusals[0].startswith("triton: expected kernels that give known answers on gfx942")
    with pytest.raises(ValueError, match="known answers on gfx942"):
        attend(q, k, v, plan, backend=BACKEND)


def test_what_raises_is_refused(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("PassManager::run failed\nat length")

    monkeypatch.setattr(block_sparse.portable, "launch", fail)
    assert "got RuntimeError: PassManager::run failed." in (refusal(plan_of(CASE)) or "")


def test_nothing_is_looked_at_where_the_gpu_tests_have_run(
    monkeypatch: pytest.MonkeyPatch, runs: list[BlockPlan]
):
    for name in ("sm_90", "cpu"):
        monkeypatch.setattr(known_answers, "architecture", lambda device, name=name: name)
        assert refusal(plan_of(CASE)) is None
    assert not runs


def test_a_capture_refuses_and_decides_nothing(
    monkeypatch: pytest.MonkeyPatch, runs: list[BlockPlan]
):
    """What a capture records must not wait for the device."""
    plan = plan_of(CASE)

    class OnGpu:
        is_cuda, device, dtype, shape = True, torch.device("cpu"), torch.float32, (1, 2, 99, 64)

        def get_device(self) -> int:
            return -1

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    reason = known_answers.refusal(BACKEND, OnGpu(), OnGpu(), plan)
    assert "outside of the capture of a CUDA graph" in (reason or "")
    assert not runs
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert known_answers.refusal(BACKEND, OnGpu(), OnGpu(), plan) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert known_answers.refusal(BACKEND, OnGpu(), OnGpu(), plan) is None
    assert len(runs) == 1


KINDS = {
    "words and biases": {"masks": "words", "biased": True},
    "disks, an order for each head": {"masks": "disk", "order": 2},
    "pools": {"factors": (4, 16), "order": 1},
    "pools and boxes": {"masks": "box", "factors": (8,)},
    "zeroth": {"tail": "zeroth", "hidden": True, "uneven": True},
    "first": {"tail": "first", "hidden": True, "order": 1},
    "block": {"tail": "block"},
    "whole blocks": {"ragged": False},
    "shared keys": {"grouped": True},
}


@pytest.mark.parametrize("features", KINDS.values(), ids=KINDS)
def test_small_problems_of_every_kind_are_sound(features: dict[str, Any]):
    """The plans are well-formed, and of the kind that they stand for."""
    plain = known_answers.Kind(
        BACKEND, "gfx942", torch.float16, (64, 64), (64, 64), "", 0, (), "none",
        False, False, False, True, False,
    )  # fmt: skip
    kind = replace(plain, **features)
    plan = plan_check.check(known_answers._plan(kind))
    q = torch.zeros(1, 2, plan.q_blocks.total, 64, dtype=torch.float16)
    assert known_answers.Kind.of(BACKEND, q, q[:, : 1 if kind.grouped else 2], plan) == kind
    if kind.factors:
        assert isinstance(plan.pools, Pools)
        assert bool((plan.pools.counts.sum((0, 1, 2)) > 0).all()), "every factor occurs"
    if kind.masks:
        assert plan.partial.any()
    assert known_answers._fault(kind, torch.device("cpu")) is None


def test_the_answers_are_not_the_kernels_own(monkeypatch: pytest.MonkeyPatch):
    """A reference that is off is noticed as well."""
    real = known_answers._expected

    def off(*arguments: Any) -> AttentionOutput:
        out, lse = real(*arguments)
        return AttentionOutput(-out, lse)

    monkeypatch.setattr(known_answers, "_expected", off)
    assert "results 2.0e+00" in (refusal(plan_of(CASE)) or "")
