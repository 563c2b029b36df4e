"""Defaults of families, and named methods on every family's pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse.commands.methods import Wording
from dit_sparse.methods.pisa import PisaMethod
from dit_sparse.methods.psa import PsaMethod
from dit_sparse.methods.schedule import Schedule
from dit_sparse.methods.window import WindowMethod
from dit_sparse.pipelines.apply import apply, remove, summary
from dit_sparse.pipelines.defaults import defaults, method_for
from dit_sparse.pipelines.family import families
from dit_sparse.pipelines.tiny import tiny_call

NAMES = sorted(defaults())
all_families = pytest.mark.parametrize("family", families())
all_methods = pytest.mark.parametrize("name", NAMES)


@all_methods
@all_families
def test_every_family_has_sound_defaults_with_a_source(family: str, name: str):
    default = defaults()[name][family]
    assert default.source
    method = method_for(family, name, layers=60)
    inner = method.method if isinstance(method, Schedule) else method
    assert inner.name == name
    for option, value in default.options.items():
        assert getattr(inner, option) == value
    if isinstance(method, Schedule):
        assert method.dense_first == default.dense_first
        assert method.dense_layers == default.dense_layers


@all_methods
@all_families
@pytest.mark.parametrize("layers", [2, 60])
def test_words_of_a_command_mean_the_same(family: str, name: str, layers: int):
    wording = Wording(name)
    assert wording.on(family, layers).method() == method_for(family, name, layers=layers)
    assert wording.on(family, layers).on(family, layers) == wording.on(family, layers)
    some = Wording(name, ("block=64",)).on(family, layers).method()
    assert some == method_for(family, name, {"block": 64}, layers=layers)


def test_there_is_no_default_for_an_unknown_family():
    assert {f for by_family in defaults().values() for f in by_family} == set(families())


def test_options_replace_the_familys_and_the_schedule_stays():
    method = method_for("wan", "pisa", {"mass": 0.5}, layers=30)
    assert method == Schedule(PisaMethod(mass=0.5), dense_first=0.2, dense_layers=(0,))
    untimed = method_for("wan", "pisa", {"mass": 0.5}, layers=30, timed=False)
    assert untimed == Schedule(PisaMethod(mass=0.5), dense_layers=(0,))


def test_a_method_that_is_no_name_is_taken_as_it_is():
    assert method_for("wan", PisaMethod(), layers=30) == PisaMethod()
    assert method_for("wan", "window", layers=30) == WindowMethod()
    assert method_for("wan", {"default": "psa"}, layers=30) == Schedule(PsaMethod())


def test_dense_layers_leave_sparse_ones():
    assert method_for("flux", "pisa", layers=57).dense_layers == (0, 1, 2, 3)
    assert method_for("flux", "pisa", layers=4).dense_layers == (0, 1)


@all_methods
@all_families
def test_named_methods_run_on_every_pipeline(family: str, name: str, tiny: Any):
    """With the family's defaults; and with everything exact, the picture is the dense one."""
    pipe = tiny(family)
    dense = pipe(**tiny_call(family, pipe))[0]
    apply(pipe, name)
    sparse = pipe(**tiny_call(family, pipe))[0]
    assert summary(pipe).sparse > 0
    assert torch.as_tensor(sparse).shape == torch.as_tensor(dense).shape
    exact = {
        "pisa": PisaMethod(density=1.0, block=64),
        "psa": PsaMethod(ends=(1.0, 1.0, 1.0, 1.0), block=64),
    }[name]
    apply(pipe, exact)
    same = pipe(**tiny_call(family, pipe))[0]
    record = summary(pipe)
    assert record.sparse > 0
    assert not record.dense
    torch.testing.assert_close(torch.as_tensor(same), torch.as_tensor(dense), rtol=0, atol=1e-4)
    remove(pipe)
