"""What planning measures serves the attention of the same call, and of no other."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from dit_sparse.attention import attend, plan_and_attend
from dit_sparse.backend import AttentionOutput, BlockSummaries
from dit_sparse.forward import Forward, StockCall
from dit_sparse.frame import frame_of
from dit_sparse.grid import Permutation, TokenGrid, TokenLayout
from dit_sparse.kernels.reference import ReferenceBackend
from dit_sparse.method import CallContext, SparseMethod
from dit_sparse.methods.pisa import PisaMethod
from dit_sparse.methods.psa import PsaMethod
from dit_sparse.plan import BlockPlan
from dit_sparse.session import Session
from dit_sparse.summaries import Summaries

kernels = pytest.importorskip("dit_sparse.kernels.summaries")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")

LAYOUT = TokenLayout.of(TokenGrid(1, 12, 16))
PISA = PisaMethod(density=0.5, block=64, tail="zeroth", order="raster")
CALL = StockCall(0, None, None, lambda q, k, v: v)


def qkv(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(1, 2, LAYOUT.length, 8, generator=generator) for _ in range(3)]


@dataclass
class Measured:
    """The reference, and whether each of its calls got summaries; those that it gets are right."""

    calls: list[bool] = field(default_factory=list)
    name = "reference"
    reorders = False

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> None:
        return None

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
    ) -> AttentionOutput:
        self.calls.append(False)
        return ReferenceBackend().run(q, k, v, plan, scale)

    def run_summarised(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: BlockPlan,
        scale: float,
        summaries: BlockSummaries,
    ) -> AttentionOutput:
        self.calls.append(True)
        torch.testing.assert_close(summaries.lengths, q.norm(dim=-1))
        torch.testing.assert_close(summaries.longest.amax(-1), k.norm(dim=-1).amax(-1))
        if plan.tail != "none":
            assert summaries.means is not None
            blocks = torch.stack([k, v]).unflatten(3, (-1, 64))
            torch.testing.assert_close(summaries.means, blocks.mean(4))
        return ReferenceBackend().run(q, k, v, plan, scale)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Measured:
    """The only backend; planning measures in Triton's interpreter."""
    measured = Measured()
    monkeypatch.setattr("dit_sparse.attention.backends", lambda precision="bf16": (measured,))
    monkeypatch.setattr(kernels, "worth", lambda *_: True)
    return measured


@pytest.mark.parametrize(
    "method",
    [
        PISA,
        replace(PISA, tail="none"),
        replace(PISA, forced=("self",)),
        PsaMethod(
            block=64, importance="means", skipped="mean", ends=(0.4, 0.4, 0.7, 0.7), order="raster"
        ),
    ],
)
def test_a_call_that_is_planned_and_run_at_once(method: SparseMethod, backend: Measured):
    q, k, v = qkv(0)
    context = CallContext(LAYOUT, step=0)
    got = plan_and_attend(method, q, k, v, context)
    assert backend.calls == [True]
    expected = attend(q, k, v, method.plan(q, k, replace(context, values=v)))
    assert backend.calls == [True, False]  # a plan alone carries nothing
    torch.testing.assert_close(got.out, expected.out)
    torch.testing.assert_close(got.lse, expected.lse)


@pytest.mark.parametrize("order", ["hilbert", "raster"])
def test_only_tensors_in_the_order_of_the_blocks(order: str, backend: Measured):
    q, k, v = qkv(0)
    method = replace(PISA, order=order)
    plan_and_attend(method, q, k, v, CallContext(LAYOUT))
    assert backend.calls == [order == "raster"]
    plan_and_attend(method, q, k, v, CallContext(LAYOUT, ordered=True))
    assert backend.calls == [order == "raster", True]


def test_without_a_kernel_nothing_is_measured():
    q, k, v = qkv(0)
    summaries = Summaries(q, k, v)
    plan = PISA.plan(q, k, CallContext(LAYOUT, summaries=summaries))
    assert not summaries.measured
    assert summaries.of(q, k, v, plan) is None


def test_they_describe_no_other_tensors_and_no_other_plan(backend: Measured):
    q, k, v = qkv(0)
    context = CallContext(LAYOUT, values=v)

    def planned(*others: Tensor) -> tuple[Summaries, BlockPlan]:
        summaries = Summaries(q, k, v)
        return summaries, PISA.plan(*others, replace(context, summaries=summaries))

    for others in ((q.clone(), k), (q, k.clone())):
        assert not planned(*others)[0].measured
    summaries, plan = planned(q, k)
    assert summaries.of(q, k, v, plan) is not None
    for n in range(3):
        tensors = [x.clone() if i == n else x for i, x in enumerate((q, k, v))]
        assert summaries.of(*tensors, plan) is None
    frame = frame_of(LAYOUT, 32)
    order = Permutation(torch.arange(LAYOUT.length))
    for other in (
        replace(plan, q_blocks=frame.blocks),
        replace(plan, k_blocks=frame.blocks),
        replace(plan, hidden=torch.zeros(1, plan.k_blocks.n, dtype=torch.bool)),
        replace(plan, order=order),
    ):
        assert summaries.of(q, k, v, other) is None
    ours = frame_of(LAYOUT, 64, "raster", device=q.device)
    assert summaries.keys(k, ours) is not None
    assert summaries.keys(k.clone(), ours) is None
    assert summaries.keys(k, frame) is None
    assert summaries.keys(k, replace(ours, order=order)) is None
    summaries = Summaries(q, k, v)  # measured for a plan without a tail, which takes no means
    dropping = replace(PISA, tail="none").plan(q, k, replace(context, summaries=summaries))
    assert summaries.of(q, k, v, dropping) is not None
    assert summaries.of(q, k, v, replace(dropping, tail="zeroth")) is None


def attended(session: Session, steps: int, branches: int) -> list[Tensor]:
    """Outputs of all forwards; tensors grow from one to the next."""
    out = []
    for step in range(steps):
        for branch in range(branches):
            session.begin(Forward(LAYOUT, step=step, steps=9))
            nth = 10 * step + branch
            out.append(session.attend(*qkv(nth, scale=1.0 + nth), CALL))
    return out


@pytest.mark.parametrize(
    ("options", "branches", "measured"),
    [
        ({}, 1, [True] * 4),
        ({"reuse_steps": 2}, 1, [True, False] * 2),
        ({"reuse_steps": 9}, 1, [True, False, False, False]),
        ({"share_branches": True}, 2, [True, False] * 4),
    ],
)
def test_a_plan_that_serves_again_goes_without(
    options: dict, branches: int, measured: list[bool], backend: Measured
):
    """The backend then measures for itself: a bound or means of other tensors would be wrong."""
    session = Session(replace(PISA, **options), ("a",))
    got = attended(session, 4, branches)
    assert backend.calls == measured
    expected = attended(Session(replace(PISA, **options), ("a",), backend="reference"), 4, branches)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_outlives_the_call(backend: Measured):
    """A kept plan does not keep the tensors that it was made from."""
    session = Session(replace(PISA, reuse_steps=9), ("a",))
    session.begin(Forward(LAYOUT, step=0, steps=9))
    q, k, v = qkv(0)
    alive = weakref.ref(q)
    session.attend(q, k, v, CALL)
    assert backend.calls == [True]
    del q, k, v
    gc.collect()
    assert alive() is None
