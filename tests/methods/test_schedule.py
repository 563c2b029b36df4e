"""When a method applies, and what a schedule says when it cannot know."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.method import CallContext, PlanScope, SparseMethod
from dit_sparse.methods.dense import DenseMethod
from dit_sparse.methods.schedule import Schedule
from dit_sparse.methods.window import WindowMethod
from dit_sparse.plan import BlockPlan, Blocks

WINDOW = WindowMethod(density=0.5)
CONTEXT = CallContext(TokenLayout((TokenGrid(1, 4, 4),)), layer=0, layers=4, step=0, steps=10)


@dataclass(frozen=True)
class Probe:
    """A method whose plans carry its number: as many blocks."""

    blocks: int = 1
    scope: PlanScope = "layout"

    name: ClassVar[str] = "probe"

    def dense_reason(self, ctx: CallContext) -> str | None:
        return None

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        blocks = Blocks.of_runs([1] * self.blocks, 1)
        every = torch.ones(1, 1, blocks.n, blocks.n, dtype=torch.bool)
        return BlockPlan.from_mask(every, blocks, blocks)


def dense_steps(schedule: Schedule, steps: int = 10) -> list[int]:
    contexts = [replace(CONTEXT, step=step, steps=steps) for step in range(steps)]
    return [ctx.step for ctx in contexts if schedule.dense_reason(ctx) is not None]


def dense_layers(schedule: Schedule, layers: int = 4) -> list[int]:
    contexts = [replace(CONTEXT, layer=layer, layers=layers) for layer in range(layers)]
    return [ctx.layer for ctx in contexts if schedule.dense_reason(ctx) is not None]


class TestSteps:
    @pytest.mark.parametrize(
        ("first", "last", "expected"),
        [
            (0, 0, []),
            (0.0, 0.0, []),
            (1, 0, [0]),
            (3, 2, [0, 1, 2, 8, 9]),
            (0.2, 0.1, [0, 1, 9]),
            (0.25, 0, [0, 1, 2]),  # fractions round up
            (0, 0.01, [9]),
            (1.0, 0, list(range(10))),
            (0, 1.0, list(range(10))),
            (10, 0, list(range(10))),
            (99, 0, list(range(10))),
            (0, 99, list(range(10))),
            (7, 7, list(range(10))),
        ],
    )
    def test_counts_and_fractions(self, first: float, last: float, expected: list[int]):
        assert dense_steps(Schedule(WINDOW, dense_first=first, dense_last=last)) == expected

    @pytest.mark.parametrize(
        ("fraction", "steps", "count"), [(0.28, 25, 7), (0.07, 100, 7), (0.3, 10, 3), (0.1, 3, 1)]
    )
    def test_a_fraction_is_not_more_for_its_rounding_error(
        self, fraction: float, steps: int, count: int
    ):
        """0.28 * 25 and 0.07 * 100 are a little more than 7 in floating point."""
        assert len(dense_steps(Schedule(WINDOW, dense_first=fraction), steps)) == count
        assert len(dense_steps(Schedule(WINDOW, dense_last=fraction), steps)) == count

    def test_an_integer_one_is_a_step_and_a_float_one_is_all(self):
        assert len(dense_steps(Schedule(WINDOW, dense_first=1))) == 1
        assert len(dense_steps(Schedule(WINDOW, dense_first=1.0))) == 10

    def test_the_reason_names_the_setting(self):
        reason = Schedule(WINDOW, dense_first=2, dense_last=0.5).dense_reason
        assert reason(CONTEXT) == "dense_first=2"
        assert reason(replace(CONTEXT, step=9)) == "dense_last=0.5"
        assert reason(replace(CONTEXT, step=4)) is None

    @pytest.mark.parametrize(
        ("name", "value"), [("dense_first", 1), ("dense_first", 0.5), ("dense_last", 1)]
    )
    def test_an_unknown_step(self, name: str, value: float):
        with pytest.raises(ValueError, match=r"know the denoising step .* or pass steps="):
            Schedule(WINDOW, **{name: value}).dense_reason(replace(CONTEXT, step=None, steps=None))

    @pytest.mark.parametrize(
        ("name", "value"), [("dense_first", 0.5), ("dense_last", 1), ("dense_last", 0.1)]
    )
    def test_an_unknown_number_of_steps(self, name: str, value: float):
        with pytest.raises(ValueError, match=rf"number of denoising steps for {name}, .* steps="):
            Schedule(WINDOW, **{name: value}).dense_reason(replace(CONTEXT, steps=None))

    def test_what_need_not_be_known(self):
        unknown = replace(CONTEXT, steps=None)
        assert Schedule(WINDOW, dense_first=2).dense_reason(unknown) == "dense_first=2"
        assert Schedule(WINDOW).dense_reason(replace(unknown, step=None)) is None

    @pytest.mark.parametrize("name", ["dense_first", "dense_last"])
    @pytest.mark.parametrize(
        "wrong", [-1, -0.1, 1.1, float("nan"), float("inf"), "1", True, None, [1]]
    )
    def test_refuses(self, name: str, wrong: object):
        with pytest.raises(
            ValueError, match=rf"Expected {name} to be a count .* got {re.escape(repr(wrong))}\."
        ):
            Schedule(WINDOW, **{name: wrong})


class TestLayers:
    @pytest.mark.parametrize(
        ("layers", "expected"),
        [((), []), ((0,), [0]), ((-1,), [3]), ((1, -4), [0, 1]), ((0, 1, 2, 3), [0, 1, 2, 3])],
    )
    def test_dense_layers(self, layers: tuple[int, ...], expected: list[int]):
        assert dense_layers(Schedule(WINDOW, dense_layers=layers)) == expected

    @pytest.mark.parametrize("layer", [4, -5, 99])
    def test_layers_that_do_not_exist(self, layer: int):
        for options in ({"dense_layers": (layer,)}, {"layers": ((layer, WINDOW),)}):
            schedule = Schedule(WINDOW, **options)
            for nested in (schedule, Schedule(schedule), Schedule(WINDOW, layers=((0, schedule),))):
                with pytest.raises(ValueError, match=f"layer numbers from -4 to 3, got {layer}"):
                    nested.check_layers(4)
            schedule.check_layers(100)

    def test_one_layer_named_twice(self):
        schedule = Schedule(WINDOW, layers=((0, DenseMethod()), (-4, WINDOW)))
        with pytest.raises(
            ValueError, match="one method per layer, got 0 and -4 for the same of 4"
        ):
            schedule.check_layers(4)
        schedule.check_layers(5)

    @pytest.mark.parametrize("wrong", [0, "01", (0.5,), (True,), ("0",), None])
    def test_refuses_what_are_no_layers(self, wrong: object):
        with pytest.raises(ValueError, match=r"dense_layers to be layer numbers, .* got"):
            Schedule(WINDOW, dense_layers=wrong)

    @pytest.mark.parametrize("wrong", [0, (0,), ((0, "window"),), ((True, WINDOW),), ((0, 1, 2),)])
    def test_refuses_what_are_no_methods_of_layers(self, wrong: object):
        with pytest.raises(ValueError, match=r"pairs of a layer number and a method, got"):
            Schedule(WINDOW, layers=wrong)

    def test_refuses_a_name_for_the_method(self):
        with pytest.raises(ValueError, match=r"Expected a method, got 'window'.*create"):
            Schedule("window")

    def test_lists_become_tuples(self):
        schedule = Schedule(WINDOW, dense_layers=[0, 1], layers=[[2, DenseMethod()]])
        assert schedule == Schedule(WINDOW, dense_layers=(0, 1), layers=((2, DenseMethod()),))
        assert hash(schedule) == hash(replace(schedule))
        assert Schedule(WINDOW, dense_layers=range(2)).dense_layers == (0, 1)

    def test_the_method_that_serves_a_layer(self):
        inner = Schedule(Probe(1), layers=((1, Probe(2)),))
        for schedule in (inner, Schedule(inner), Schedule(Probe(3), layers=((1, inner),))):
            assert schedule.at(replace(CONTEXT, layer=1)) == Probe(2)

    def test_another_method_for_some_layers(self):
        schedule = Schedule(Probe(1), layers=((1, Probe(2)), (-1, Probe(3))))
        q = torch.empty(1, 1, 1, 1)
        plans = [schedule.plan(q, q, replace(CONTEXT, layer=n)) for n in range(4)]
        assert [plan.q_blocks.n for plan in plans] == [1, 2, 1, 3]

    def test_a_dense_method_for_some_layers(self):
        assert dense_layers(Schedule(WINDOW, layers=((2, DenseMethod()),))) == [2]
        assert dense_layers(Schedule(DenseMethod(), layers=((2, WINDOW),))) == [0, 1, 3]

    def test_dense_layers_win(self):
        schedule = Schedule(DenseMethod(), dense_layers=(2,), layers=((2, WINDOW),))
        assert dense_layers(schedule) == [0, 1, 2, 3]


class TestTokens:
    @pytest.mark.parametrize(("least", "dense"), [(0, False), (16, False), (17, True)])
    def test_min_tokens(self, least: int, dense: bool):
        reason = Schedule(WINDOW, min_tokens=least).dense_reason(CONTEXT)
        assert (reason is not None) == dense
        if dense:
            assert reason == "16 tokens are fewer than min_tokens=17"

    def test_short_sequences_need_no_step(self):
        schedule = Schedule(WINDOW, min_tokens=17, dense_first=0.5)
        assert schedule.dense_reason(replace(CONTEXT, step=None, steps=None)) is not None

    @pytest.mark.parametrize("wrong", [-1, "3", True, float("nan"), 1.5, None])
    def test_refuses(self, wrong: object):
        with pytest.raises(ValueError, match=f"integer min_tokens of at least 0, got {wrong!r}"):
            Schedule(WINDOW, min_tokens=wrong)


class TestScope:
    @pytest.mark.parametrize(
        ("scopes", "expected"),
        [
            (["layout"], "layout"),
            (["layer"], "layer"),
            (["call"], "call"),
            (["layout", "layout"], "layer"),
            (["layer", "layout"], "layer"),
            (["layout", "call"], "call"),
            (["call", "layer"], "call"),
        ],
    )
    def test_the_narrowest_inside(self, scopes: list[PlanScope], expected: PlanScope):
        first, *others = (Probe(scope=scope) for scope in scopes)
        assert Schedule(first, layers=tuple(enumerate(others))).scope == expected

    def test_it_is_a_method_and_hashable(self):
        schedule = Schedule(WINDOW, dense_layers=(0,), layers=((1, DenseMethod()),))
        assert isinstance(schedule, SparseMethod)
        assert hash(schedule) == hash(replace(schedule))
        assert schedule == replace(schedule)
