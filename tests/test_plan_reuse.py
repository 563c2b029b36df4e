"""Plans made from q and k that serve several steps or guidance branches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_sparse.attention import plan_and_attend
from dit_sparse.backend import AttentionOutput
from dit_sparse.forward import Forward, StockCall
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.kernels.reference import ReferenceBackend
from dit_sparse.method import CallContext, SparseMethod
from dit_sparse.methods.pisa import PisaMethod
from dit_sparse.methods.psa import PsaMethod
from dit_sparse.plan import BlockPlan
from dit_sparse.plan_reuse import PlanReuse
from dit_sparse.session import Session

LAYOUT = TokenLayout.of(TokenGrid(1, 16, 20))


def qkv(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 2, LAYOUT.length, 8, generator=generator) for _ in range(3)]


def forwards(
    session: Session, steps: list[int | None], branches: int = 1, generation: int = 0
) -> list[Tensor]:
    """Outputs of the first layer of every forward; q, k, v differ in every forward."""
    outputs = []
    for nth, step in enumerate(steps):
        for branch in range(branches):
            session.begin(Forward(LAYOUT, step=step, steps=9, generation=generation))
            for layer in range(len(session.layers)):
                call = StockCall(layer, None, None, lambda q, k, v: v)
                out = session.attend(*qkv(100 * nth + 10 * branch + layer), call)
                outputs += [out] if layer == 0 else []
    return outputs


def session_of(method: SparseMethod) -> Session:
    return Session(method, ("a", "b"))


def plans(session: Session, layer: int = 0) -> int:
    record = session.layers[layer]
    return record.sparse - record.reused


PISA = PisaMethod(density=0.4, block=64)


@pytest.mark.parametrize("method", [PISA, PsaMethod(block=64, ends=(0.2, 0.4, 0.6, 0.8))])
def test_every_call_has_its_own_plan_by_default(method: SparseMethod):
    session = session_of(method)
    forwards(session, [0, 1, 2], branches=2)
    assert plans(session) == session.layers[0].sparse == 6


@pytest.mark.parametrize(("steps", "made"), [(1, 5), (2, 3), (4, 2), (9, 1)])
def test_a_plan_serves_so_many_steps(steps: int, made: int):
    session = session_of(replace(PISA, reuse_steps=steps))
    forwards(session, [0, 1, 2, 3, 4])
    assert plans(session, 0) == plans(session, 1) == made


def test_branches_have_plans_of_their_own_unless_shared():
    session = session_of(replace(PISA, reuse_steps=3))
    forwards(session, [0, 1, 2], branches=2)
    assert plans(session) == 2
    session = session_of(replace(PISA, share_branches=True))
    forwards(session, [0, 1, 2], branches=2)
    assert plans(session) == 3
    session = session_of(replace(PISA, share_branches=True, reuse_steps=2))
    forwards(session, [0, 1, 2], branches=3)
    assert plans(session) == 2


def test_what_is_reused_is_the_choice_and_not_the_summaries():
    """Means and covariances are those of the call: only the lists are old."""
    reused = forwards(session_of(replace(PISA, reuse_steps=2, density=1.0)), [0, 1])
    fresh = forwards(session_of(replace(PISA, density=1.0)), [0, 1])
    for a, b in zip(reused, fresh, strict=True):
        torch.testing.assert_close(a, b)
    reused = forwards(session_of(replace(PISA, reuse_steps=2)), [0, 1])
    fresh = forwards(session_of(PISA), [0, 1])
    assert torch.equal(reused[0], fresh[0])
    assert not torch.equal(reused[1], fresh[1])


def test_a_new_generation_forgets():
    session = session_of(replace(PISA, reuse_steps=9))
    forwards(session, [0, 1])
    forwards(session, [0, 1], generation=1)
    assert plans(session) == 2


def test_a_step_must_be_known():
    with pytest.raises(ValueError, match="know the denoising step for reuse_steps"):
        forwards(session_of(replace(PISA, reuse_steps=2)), [None])
    forwards(session_of(PISA), [None])


def test_a_plan_for_tokens_in_order_serves_no_others():
    reuse = PlanReuse[object]()
    method, q = PisaMethod(reuse_steps=3), qkv(0)[0]
    context = CallContext(LAYOUT, step=0, steps=9)
    first = reuse.get(method, q, context, object)
    assert reuse.get(method, q, replace(context, step=1), object) is first
    assert reuse.get(method, q, replace(context, step=2, ordered=True), object) is not first


@pytest.mark.parametrize(
    ("options", "branches", "prepared"),
    [({}, 1, 0), ({"reuse_steps": 2}, 1, 2), ({"share_branches": True}, 2, 4)],
)
def test_a_call_is_made_ready_again_only_for_plans_that_serve_again(
    options: dict, branches: int, prepared: int, monkeypatch: pytest.MonkeyPatch
):
    """It takes the host longer than the call itself."""
    calls: list[Tensor] = []

    class Preparing(ReferenceBackend):
        def prepare(
            self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
        ) -> tuple[AttentionOutput, None]:
            calls.append(q)
            return self.run(q, k, v, plan, scale), None

    monkeypatch.setattr("dit_sparse.attention.backends", lambda precision="bf16": (Preparing(),))
    session = session_of(replace(PISA, order="raster", **options))
    forwards(session, [0, 1, 2, 3], branches=branches)
    assert len(calls) == len(session.layers) * prepared
    calls.clear()
    plan_and_attend(replace(PISA, order="raster"), *qkv(0), CallContext(LAYOUT))
    assert not calls
