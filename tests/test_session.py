"""The session: which calls are sparse, how often plans are made, what is recorded and warned of."""

from __future__ import annotations

import copy
import logging
import pickle
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dit_sparse.attention import select_backend
from dit_sparse.forward import Forward, StockCall, hides_only_padding
from dit_sparse.grid import TextSpan, TokenGrid, TokenLayout
from dit_sparse.levels import plan_of_levels
from dit_sparse.method import CallContext
from dit_sparse.methods import create
from dit_sparse.methods.schedule import Schedule
from dit_sparse.plan import BlockPlan, Blocks
from dit_sparse.plan_cache import PlanCache, PlannedCall
from dit_sparse.record import Summary
from dit_sparse.session import Session

LAYOUT = TokenLayout.of(TokenGrid(2, 4, 4), text_last=5)
NAMES = ("a", "b")
PLANS: list[CallContext] = []


@dataclass(frozen=True)
class Half:
    """Reads the first half of the keys; notes every plan it makes."""

    scope: str = "layout"
    name: ClassVar[str] = "half"

    def dense_reason(self, ctx: CallContext) -> str | None:
        return None

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        PLANS.append(ctx)
        blocks = Blocks.uniform(ctx.layout.length, 8)
        visited = torch.zeros(1, 1, blocks.n, blocks.n, dtype=torch.bool)
        visited[..., : blocks.n // 2] = True
        return BlockPlan.from_mask(visited, blocks, blocks)


@pytest.fixture(autouse=True)
def _no_plans() -> None:
    PLANS.clear()


def stock(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.full_like(q, 7.0)


def call(layer: int = 0, **changes: Any) -> StockCall:
    return StockCall(layer, None, None, stock)._replace(**changes)


def qkv(tokens: int = LAYOUT.length, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, 2, tokens, 16, generator=source) for _ in range(3))
    return q, k, v


def test_sparse_call_runs_the_plan_and_is_recorded() -> None:
    session = Session(Half(), NAMES)
    session.begin(Forward(LAYOUT))
    q, k, v = qkv()
    out = session.attend(q, k, v, call(1))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k[:, :, :16], v[:, :, :16])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    record = session.layers[1]
    assert (record.sparse, record.dense.total(), record.backend) == (1, 0, "reference")
    summary = record.summarise("transformer", 1, "half")
    assert summary.density == pytest.approx(16 / LAYOUT.length)


def test_calls_like_one_before_are_not_examined_again(monkeypatch: Any) -> None:
    seen = []

    def counted(*arguments: Any) -> Any:
        seen.append(arguments[0].dtype)
        return select_backend(*arguments)

    monkeypatch.setattr("dit_sparse.attention.select_backend", counted)
    session = Session(Half(), NAMES)
    for dtype in (torch.float32, torch.float32, torch.float64, torch.float32):
        session.begin(Forward(LAYOUT))
        for layer in range(len(NAMES)):
            q, k, v = (t.to(dtype) for t in qkv())
            out = session.attend(q, k, v, call(layer))
            expected = torch.nn.functional.scaled_dot_product_attention(
                q, k[:, :, :16], v[:, :, :16]
            )
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    assert seen == [torch.float32, torch.float64]


def test_density_is_the_mean_of_all_calls() -> None:
    session = Session(Half(), NAMES)
    layouts = [TokenLayout.of(TokenGrid(1, 4, width)) for width in (4, 6, 4, 8)]
    expected = []
    for layout in layouts:
        session.begin(Forward(layout))
        for _ in range(3 if layout is layouts[0] else 1):
            q, k, v = qkv(layout.length)
            session.attend(q, k, v, call())
            expected.append(Half().plan(q, k, CallContext(layout)).density)
    summary = Summary((session.layers[0].summarise("transformer", 0, "half"),))
    assert len(set(expected)) > 1
    assert summary.density == pytest.approx(sum(expected) / len(expected))


def test_densities_are_added_up_without_keeping_plans(monkeypatch: Any) -> None:
    plans = []

    def planned(plan: BlockPlan) -> PlannedCall:
        plans.append(weakref.ref(plan))
        return PlannedCall(plan)

    monkeypatch.setattr("dit_sparse.plan_cache.PlannedCall", planned)
    session = Session(Half("call"), NAMES)
    for _ in range(5):
        session.begin(Forward(LAYOUT))
        session.attend(*qkv(), call())
    assert len(plans) == 5
    assert sum(plan() is not None for plan in plans) == 1
    assert session.layers[0].density == pytest.approx(16 / LAYOUT.length)


@pytest.mark.parametrize("tail", ["none", "zeroth"])
@pytest.mark.parametrize("pooled", [False, True])
def test_density_is_measured_without_waiting_for_the_device(tail: Any, pooled: bool) -> None:
    source = torch.Generator().manual_seed(0)
    visited = torch.rand(2, 3, 6, 6, generator=source) < 0.4
    blocks = Blocks.of_runs([8, 3, 8, 17], 8)
    plan = BlockPlan.from_mask(visited, blocks, blocks, tail=tail)
    if pooled:
        level = torch.tensor([0, 1, 2, 8], dtype=torch.uint8)
        level = level[torch.randint(4, visited.shape, generator=source)]
        plan = plan_of_levels(level, blocks, blocks, factors=(2, 8), tail=tail)
    with FakeTensorMode(allow_non_fake_inputs=True):  # knows no values
        plan = plan.to("cpu")  # without what it has computed
        plan.density_tensor  # noqa: B018
        with pytest.raises(DataDependentOutputException):
            plan.density  # noqa: B018


@pytest.mark.parametrize(
    ("scope", "plans"), [("layout", 1), ("layer", len(NAMES)), ("call", 3 * len(NAMES))]
)
def test_plans_are_made_as_often_as_the_scope_says(scope: str, plans: int) -> None:
    session = Session(Half(scope), NAMES)
    for step in range(3):
        session.begin(Forward(TokenLayout(LAYOUT.segments), step=step, steps=3))
        for layer in range(len(NAMES)):
            session.attend(*qkv(), call(layer))
    assert len(PLANS) == plans
    assert (PLANS[-1].layers, PLANS[-1].steps) == (len(NAMES), 3)


def test_layers_share_the_plans_of_the_method_that_serves_them() -> None:
    names = tuple("abcdef")
    for layers, plans in [
        (((0, create("dense")),), 1),
        (((0, Half("layer")), (1, Half("layer"))), 3),
        (((0, Half("call")),), 1 + 2),
    ]:
        PLANS.clear()
        session = Session(Schedule(Half(), layers=layers), names)
        for step in range(2):
            session.begin(Forward(LAYOUT, step=step, steps=2))
            for layer in range(len(names)):
                session.attend(*qkv(), call(layer))
        assert len(PLANS) == plans


def test_layers_are_checked_before_any_call() -> None:
    with pytest.raises(ValueError, match="layer numbers from -2 to 1, got 2"):
        Session(Schedule(Half(), dense_layers=(2,)), NAMES)


def test_plans_made_in_inference_mode_serve_training() -> None:
    session = Session(create("window", {"density": 0.5}), NAMES)
    with torch.inference_mode():
        session.begin(Forward(LAYOUT))
        session.attend(*qkv(), call())
    q, k, v = (t.requires_grad_() for t in qkv())
    session.begin(Forward(LAYOUT))
    session.attend(q, k, v, call()).sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (q, k, v))
    assert session.layers[0].sparse == 2


def test_what_a_method_makes_in_inference_mode_it_may_remember() -> None:
    with torch.inference_mode():
        q, k, _ = qkv()
        plan = PlanCache(Half()).get(q, k, CallContext(LAYOUT)).plan
    assert not plan.indices.is_inference()


def test_plans_of_eight_layouts_are_kept() -> None:
    session = Session(Half(), NAMES)
    layouts = [TokenLayout.of(TokenGrid(1, 4, 4 + n)) for n in range(9)]
    for layout in layouts:
        session.begin(Forward(layout))
        session.attend(*qkv(layout.length), call())
    assert len(session._plans) == 8
    for layout in (layouts[8], layouts[0]):
        session.begin(Forward(layout))
        session.attend(*qkv(layout.length), call())
    assert [ctx.layout for ctx in PLANS] == [*layouts, layouts[0]]  # only the oldest anew


def test_image_only_attention_has_the_layout_without_text() -> None:
    session = Session(Half(), NAMES)
    session.begin(Forward(LAYOUT))
    session.attend(*qkv(LAYOUT.grid.length), call())
    assert PLANS[0].layout == LAYOUT.without_text()


@pytest.mark.parametrize(
    ("forward", "tokens", "change", "reason"),
    [
        (Forward(None, "The mask is odd."), 37, {}, "The mask is odd."),
        (Forward(LAYOUT), 36, {}, "got 36 tokens"),
        (Forward(LAYOUT), 37, {"obstacle": "dropout"}, "dropout"),
        (Forward(LAYOUT), 37, {"mask": torch.ones(37, 37).tril().bool()}, "only hides text"),
        (
            Forward(TokenLayout((TokenGrid(2, 4, 4), TextSpan(5, (3, 2))))),
            37,
            {},
            "text lengths for a batch of 1, got 2",
        ),
    ],
)
def test_what_has_no_place_runs_the_stock_core_and_says_why(
    forward: Forward, tokens: int, change: dict[str, Any], reason: str, caplog: Any
) -> None:
    session = Session(Half(), NAMES)
    session.begin(forward)
    with caplog.at_level(logging.WARNING, "dit_sparse"):
        for _ in range(2):
            assert session.attend(*qkv(tokens), call(**change)).eq(7).all()
    assert session.layers[0].sparse == 0
    ((said, count),) = session.layers[0].dense.items()
    assert reason in said
    assert count == 2
    assert sum(reason in message for message in caplog.messages) == 1  # logged once


def test_call_without_a_forward_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"in a forward of .* for each transformer"):
        Session(Half(), NAMES).attend(*qkv(), call())


def test_cross_attention_runs_the_stock_core() -> None:
    session = Session(Half(), NAMES)
    session.begin(Forward(LAYOUT))
    q, _, _ = qkv()
    _, k, v = qkv(9)
    assert session.attend(q, k, v, call()).eq(7).all()


def test_key_mask_that_is_the_text_length_is_dropped_and_read_once_per_generation(
    monkeypatch: Any,
) -> None:
    layout = TokenLayout((TokenGrid(2, 4, 4), TextSpan(5, (2, 5))))
    mask = torch.ones(2, 1, 1, 37, dtype=torch.bool)
    mask[0, ..., 34:] = False
    reads = []

    def counted(mask: Tensor, layout: TokenLayout) -> bool:
        reads.append(1)
        return hides_only_padding(mask, layout)

    monkeypatch.setattr("dit_sparse.session.hides_only_padding", counted)
    session = Session(create("window", {"density": 1.0}), NAMES)
    q, k, v = qkv(batch=2)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    for generation in (0, 0, 0, 1):
        forward = Forward(TokenLayout(layout.segments), generation=generation, makes_masks=True)
        session.begin(forward)
        for layer in range(len(NAMES)):
            out = session.attend(q, k, v, call(layer, mask=mask))
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    assert len(reads) == 2
    assert session.layers[0].sparse == 4


def test_mask_that_a_caller_gives_is_read_in_every_forward(caplog: Any) -> None:
    session = Session(Half(), NAMES)
    mask = torch.ones(1, 1, 1, LAYOUT.length, dtype=torch.bool)
    for step, hidden in enumerate((0, 3, 0)):
        session.begin(Forward(LAYOUT))
        mask[..., :hidden] = False  # the same tensor
        for layer in range(len(NAMES)):
            session.attend(*qkv(), call(layer, mask=mask))
            session.attend(*qkv(), call(layer, mask=torch.ones_like(mask)))  # in one forward
        sparse, dense = session.layers[1].sparse, session.layers[1].dense.total()
        assert (sparse, dense) == [(2, 0), (3, 1), (4, 2)][step]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_mask_is_compared_with_the_layout_by_value(dtype: torch.dtype) -> None:
    layout = TokenLayout((TokenGrid(1, 2, 2), TextSpan(3, (1,))))
    seen = torch.tensor([1, 1, 1, 1, 1, 0, 0], dtype=torch.bool)
    other = seen.roll(1)

    def as_mask(row: Tensor) -> Tensor:
        additive = torch.zeros(7).masked_fill(~row, -1e9)
        return (row if dtype == torch.bool else additive)[None, None, None]

    assert hides_only_padding(as_mask(seen), layout)
    assert not hides_only_padding(as_mask(other), layout)
    assert not hides_only_padding(as_mask(seen).expand(1, 1, 7, 7), layout)
    assert not hides_only_padding(torch.full((1, 1, 1, 7), -0.5), layout)  # a bias


def test_schedule_keeps_steps_dense_without_padding() -> None:
    layout = TokenLayout((TokenGrid(2, 4, 4), TextSpan(5, (2,))))
    session = Session(Schedule(Half(), dense_first=1), NAMES)
    q, k, v = qkv()
    session.begin(Forward(layout, step=0, steps=2))
    dense = session.attend(q, k, v, call())
    valid = slice(0, 34)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k[:, :, valid], v[:, :, valid])
    torch.testing.assert_close(dense, expected, atol=1e-6, rtol=0)
    assert session.attend(q, k, v, call(chosen=True)).eq(7).all()  # the user's own backend
    session.begin(Forward(layout, step=1, steps=2))
    session.attend(q, k, v, call())
    assert (session.layers[0].dense.total(), session.layers[0].sparse) == (2, 1)


@pytest.mark.parametrize(("steps", "warned"), [(3, True), (None, False)])
def test_warns_once_when_a_whole_generation_was_dense(
    steps: int | None, warned: bool, caplog: Any
) -> None:
    session = Session(Schedule(Half(), dense_layers=(0, 1)), NAMES)
    for generation in range(2):
        for step in range(3):
            session.begin(Forward(LAYOUT, step=step, steps=steps, generation=generation))
            for layer in range(len(NAMES)):
                session.attend(*qkv(), call(layer))
        said = [m for m in caplog.messages if "no sparse attention" in m]
        # Without a number of steps the end is only known when the next generation begins.
        assert len(said) == (1 if warned or generation else 0)
        if said:
            assert "dense_layers" in said[0]


@pytest.mark.parametrize(("steps", "forwards"), [(None, 32), (3, 12)])
def test_warns_when_a_generation_does_not_end(
    steps: int | None, forwards: int, caplog: Any
) -> None:
    session = Session(Schedule(Half(), dense_first=2), NAMES)
    for number in range(2 * forwards):
        session.begin(Forward(LAYOUT, step=0, steps=steps))
        said = [m for m in caplog.messages if f"no sparse attention in {forwards} forwards" in m]
        assert len(said) == (number >= forwards)
        session.attend(*qkv(), call())
    assert "dense_first=2" in said[0]


def test_no_warning_for_dense_or_when_one_call_was_sparse(caplog: Any) -> None:
    for method in (create("dense"), Schedule(Half(), dense_layers=(1,))):
        session = Session(method, NAMES)
        for generation in range(2):
            session.begin(Forward(LAYOUT, step=0, steps=1, generation=generation))
            for layer in range(len(NAMES)):
                session.attend(*qkv(), call(layer))
    assert not caplog.messages


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_have_their_own_state(clone: Any) -> None:
    session = Session(create("window", {"density": 1.0}), NAMES, backend="reference")
    session.begin(Forward(LAYOUT))
    session.attend(*qkv(), call())
    other = clone(session)
    assert (other.layers[0].sparse, other.layers[0].density) == (1, 1.0)
    assert "Tensor" not in repr(other.layers)
    assert len(pickle.dumps(session)) < 2000
    other.begin(Forward(LAYOUT))
    other.attend(*qkv(), call())
    assert (session.layers[0].sparse, other.layers[0].sparse) == (1, 2)
    assert session.layers[0].density == other.layers[0].density == 1.0
    assert other.backend == "reference"


def test_named_backend_that_refuses_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("the Triton backend runs here")
    session = Session(Half(), NAMES, backend="triton")
    session.begin(Forward(LAYOUT))
    with pytest.raises(ValueError, match="GPU"):
        session.attend(*qkv(), call())
