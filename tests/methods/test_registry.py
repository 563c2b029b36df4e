"""Methods by name, and what every method must keep, the ones of tomorrow included."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch

from dit_sparse import methods
from dit_sparse.grid import TextSpan, TokenGrid, TokenLayout
from dit_sparse.method import CallContext, PlanScope, SparseMethod
from dit_sparse.methods.dense import DenseMethod
from dit_sparse.methods.schedule import Schedule
from dit_sparse.methods.window import WindowMethod
from dit_sparse.plan_check import check, check_for

LAYOUTS = [
    TokenLayout((TokenGrid(1, 1, 1),)),
    TokenLayout((TokenGrid(1, 20, 17),)),
    TokenLayout.of(TokenGrid(5, 9, 8), 13, 40),
    TokenLayout((TokenGrid(3, 7, 11), TextSpan(150, (150, 3)))),
    TokenLayout((TextSpan(6, (0, 6)), TokenGrid(1, 12, 12), TokenGrid(1, 5, 5))),
]


def needs_nothing(name: str) -> bool:
    return all(option.default is not dataclasses.MISSING for option in methods.describe(name))


@pytest.mark.parametrize("name", list(filter(needs_nothing, methods.names())))
class TestContract:
    def test_it_is_a_frozen_record(self, name: str):
        method = methods.create(name)
        assert isinstance(method, SparseMethod)
        assert dataclasses.is_dataclass(method)
        assert type(method).__dataclass_params__.frozen
        assert method == methods.create(name)
        assert hash(method) == hash(methods.create(name))

    def test_name_and_scope(self, name: str):
        method = methods.create(name)
        assert method.name == name
        assert method.scope in get_args(PlanScope)

    def test_every_option_is_explained(self, name: str):
        for option in methods.describe(name):
            assert option.help, f"{option.name} has no entry in the Args section"
            assert option.default is not dataclasses.MISSING, f"{option.name} needs a value"

    def test_defaults_are_options(self, name: str):
        defaults = {option.name: option.default for option in methods.describe(name)}
        assert methods.create(name, defaults) == methods.create(name)

    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    def test_plans_are_whole_and_leave_no_query_alone(self, name: str, layout: TokenLayout):
        method, context = methods.create(name), CallContext(layout, step=0, steps=4)
        generator = torch.Generator().manual_seed(0)
        q, k = (torch.randn(2, 3, layout.length, 16, generator=generator) for _ in range(2))
        if method.dense_reason(context) is not None:
            with pytest.raises(ValueError, match=r"no plan\."):
                method.plan(q, k, context)
            return
        plan = check_for(check(method.plan(q, k, context)), q, k)
        assert bool(plan.to_mask().any(-1).all())
        assert "\n" not in str(plan)
        padding = torch.ones(2, layout.length, dtype=torch.bool)
        for entry in range(2):
            for start, stop in layout.valid_ranges(entry) if layout.batch else [(0, None)]:
                padding[entry, start:stop] = False
        read = plan.to_mask().expand(2, -1, -1, -1).any(2)
        assert not (read & padding[:, None]).any(), "text padding is never read"

    def test_an_unknown_option(self, name: str):
        with pytest.raises(ValueError, match=f"Expected an option of '{name}' among .*'no_such"):
            methods.create(name, {"no_such_option": 1})


class TestNames:
    def test_present(self):
        assert {"dense", "window"} <= set(methods.names())
        assert methods.names() == sorted(methods.names())
        assert "schedule" not in methods.names(), "it wraps a method and is none by itself"

    @pytest.mark.parametrize(("wrong", "near"), [("windows", "window"), ("Dense", "dense")])
    def test_an_unknown_one_gets_the_nearest(self, wrong: str, near: str):
        with pytest.raises(
            ValueError, match=rf"among .*dense.*, got '{wrong}'\. Did you mean '{near}"
        ):
            methods.create(wrong)

    def test_nothing_near(self):
        with pytest.raises(ValueError, match=r"got 'qqqq'\.$"):
            methods.create("qqqq")

    def test_an_unknown_option_gets_the_nearest(self):
        with pytest.raises(ValueError, match=r"got 'densty'\. Did you mean 'density'\?"):
            methods.create("window", {"densty": 0.3})
        with pytest.raises(ValueError, match="among none, got 'density'"):
            methods.create("dense", {"density": 0.3})

    def test_options_reach_the_method(self):
        created = methods.create("window", {"density": 0.2, "block": 64})
        assert created == WindowMethod(density=0.2, block=64)

    def test_an_option_without_a_default(self):
        with pytest.raises(ValueError, match="Expected the option 'path' of 'paro', got none"):
            methods.create("paro")

    def test_bad_values_are_the_methods_business(self):
        with pytest.raises(ValueError, match="density above 0"):
            methods.create("window", {"density": 2.0})

    def test_describe(self):
        options = {option.name: option for option in methods.describe("window")}
        assert list(options) == [f.name for f in dataclasses.fields(WindowMethod)]
        assert options["block"].default == 128
        assert options["block"].type is int
        assert options["density"].help.startswith("instead of a window:")
        assert options["density"].help.endswith("0.3 if neither is given.")
        assert methods.describe("dense") == []


class TestParse:
    def test_a_method_stays_itself(self):
        method = WindowMethod(density=0.1)
        assert methods.parse(method) is method

    def test_a_name_with_options(self):
        assert methods.parse("window") == WindowMethod()
        assert methods.parse("window", {"density": 0.1}) == WindowMethod(density=0.1)

    def test_a_mapping_of_layers(self):
        inner = WindowMethod(density=0.1)
        parsed = methods.parse({"default": "window", 0: "dense", -1: inner})
        assert parsed == Schedule(WindowMethod(), layers=((0, DenseMethod()), (-1, inner)))

    def test_without_a_default_other_layers_are_dense(self):
        assert methods.parse({2: "window"}) == Schedule(
            DenseMethod(), layers=((2, WindowMethod()),)
        )

    @pytest.mark.parametrize("key", ["0", 1.5, None, "Default"])
    def test_refuses_keys(self, key: object):
        with pytest.raises(ValueError, match=rf'layer numbers or "default" as keys, got {key!r}'):
            methods.parse({key: "dense"})

    def test_names_inside_a_mapping_are_checked(self):
        with pytest.raises(ValueError, match="Did you mean 'window'"):
            methods.parse({0: "windw"})

    @pytest.mark.parametrize("spec", [WindowMethod(), {0: "window"}])
    def test_options_belong_to_names_alone(self, spec: object):
        with pytest.raises(ValueError, match="Put them into the method itself"):
            methods.parse(spec, {"density": 0.1})

    @pytest.mark.parametrize("spec", [3, None, ["window"]])
    def test_refuses_other_things(self, spec: object):
        kind = type(spec).__name__
        with pytest.raises(ValueError, match=f"mapping of layers to methods, got {kind}"):
            methods.parse(spec)
