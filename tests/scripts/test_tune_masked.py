"""What the tuner tries on masked entries: its problems, its calls, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import pytest
import torch

pytest.importorskip("triton")

from dit_sparse.attention import attend
from dit_sparse.backend import AttentionOutput
from dit_sparse.bench import Timing
from dit_sparse.kernels import hopper, hopper_gluon, launch, portable
from dit_sparse.kernels.variants import Kernel
from dit_sparse.plan import BlockPlan
from scripts import tune_masked
from scripts.tune_masked import ERROR, RUNS, WINDOWS, Way, Windows, fault, problem, room, ways

SMALL = Windows((2, 8, 17), (5, 130), 2, ((1, 3, 9), (2, 5, 5)), (1, 8, 16), far=True)

specialised = pytest.mark.skipif(
    launch.TensorDescriptor is None, reason="needs tensor descriptors, of Triton 3.4 and later"
)


@pytest.mark.parametrize("ragged", [False, True])
def test_the_problems_have_masks_that_are_a_product(ragged: bool):
    for windows in WINDOWS[ragged]:
        plan = windows.plan("cpu")
        assert plan.k_blocks.ragged == ragged
        assert plan.mask_product is not None
        assert int(plan.partial.sum()) > 0 < int(plan.full.sum())
        assert plan.order is not None
        assert sum(windows.text) > 0
    assert plan.q_blocks.n * windows.heads >= 2048  # as many as bounds are worth


@specialised
@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize(
    ("product", "kernel"), [(False, "portable"), (False, "hopper"), (True, "hopper")]
)
def test_every_way_gives_the_reference(product: bool, bound: bool, kernel: Kernel):
    qkv, plan = problem(SMALL, "float16", 16, "cpu")
    qkv[0][:] /= 8  # float16 has few exponents for bounds, which are for bfloat16
    qkv[0][:, :, ::300] *= 80
    exact = attend(*(x.double() for x in qkv), plan, backend="reference")
    got = tune_masked.run(qkv, plan, Way(kernel, bound), product=product)
    assert got is not None
    for x, y in zip(got, exact, strict=True):
        assert float((x.double() - y).norm() / y.norm()) < ERROR


@specialised
def test_a_product_that_is_refused_is_none(monkeypatch: pytest.MonkeyPatch):
    """Without it the portable kernel does what is left, which is everything."""
    monkeypatch.setattr(hopper, "launch_specialised", lambda *_, **__: None)
    qkv, plan = problem(SMALL, "float16", 16, "cpu")
    assert tune_masked.run(qkv, plan, Way("hopper", True), product=True) is None
    got = tune_masked.run(qkv, plan, Way("hopper", True), product=False)
    assert got is not None
    assert bool(got.out.isfinite().all())


@specialised
@pytest.mark.parametrize("product", [False, True])
def test_the_kernel_in_gluon_runs_where_it_does_not_refuse(
    product: bool, monkeypatch: pytest.MonkeyPatch
):
    qkv, plan = problem(SMALL, "float16", 16, "cpu")
    seen: list[dict[str, Any]] = []

    def gluon(*given: Any, **options: Any) -> Any:
        seen.append(options)
        return hopper.launch(*given, **options) if runs else None

    monkeypatch.setattr(hopper_gluon, "launch", gluon)
    runs, way = True, Way("hopper_gluon", False)
    first = tune_masked.run(qkv, plan, way, product=product)
    runs = False
    again = tune_masked.run(qkv, plan, way, product=product)
    assert [(options["mask"] is not None, options["lengths"]) for options in seen] == (
        [(product, None)] * 2
    )
    assert first is not None
    assert again is not None
    assert torch.equal(first.out, again.out)


def test_windows_that_are_no_product_are_an_error():
    qkv, plan = problem(replace(SMALL, window=(1, 3, 9)), "float16", 16, "cpu")
    plain = replace(plan, box=None, partial=torch.zeros_like(plan.partial))
    with pytest.raises(RuntimeError, match="Expected masks that are a product"):
        tune_masked.run(qkv, plain, Way("hopper", False), product=True)


@pytest.mark.parametrize("kernel", get_args(Kernel))
def test_the_ways_are_those_of_production(kernel: Kernel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hopper, "chosen", lambda *_: kernel)
    plan = SMALL.plan("cpu")
    q = torch.empty(1, 2, plan.q_blocks.total, 16, dtype=torch.bfloat16)
    kernels = ["hopper", "hopper_gluon"] if kernel == "hopper_gluon" else ["hopper"]
    for product in (False, True):
        found, usual = ways(q, plan, product=product)
        if kernel == "portable" and not product:
            assert found == [usual] == [Way("portable", False)]
        else:
            assert found == [Way(name, bound) for name in kernels for bound in (False, True)]
            assert usual == Way(kernels[-1], True)
    assert not any(way.bound for way in ways(q.half(), plan, product=True)[0])


def test_what_is_left_is_known_to_the_portable_kernel():
    made = {
        part for s in (0, 1) for p in (0, 1) for b in (0, 1) for part in tune_masked.left(s, p, b)
    }
    assert made == set(get_args(portable.Part)) - {"added"}  # which is for biases


class TestFaults:
    exact = AttentionOutput(torch.ones(1, 1, 8, 4), torch.ones(1, 1, 8))

    def runs(self, change: Callable[[int, AttentionOutput], None]) -> str | None:
        number = iter(range(RUNS))

        def once() -> AttentionOutput:
            made = AttentionOutput(torch.ones(1, 2, 8, 4), torch.ones(1, 2, 8))
            change(next(number), made)
            return made

        return fault(once, torch.empty(1, 2, 8, 4), self.exact)

    def test_nothing(self):
        assert self.runs(lambda n, made: None) is None

    @pytest.mark.parametrize("field", [0, 1])
    @pytest.mark.parametrize("run", [0, 7, RUNS - 1])
    def test_nan_in_one_run(self, run: int, field: int):
        def change(n: int, made: AttentionOutput) -> None:
            if n == run:
                made[field][0, 1, 3] = float("nan")

        sentence = f"NaN in 1 and a different result in 0 of {RUNS} runs"
        assert self.runs(change) == sentence

    @pytest.mark.parametrize("field", [0, 1])
    def test_the_last_bit_of_some_runs(self, field: int):
        def change(n: int, made: AttentionOutput) -> None:
            if n in (3, 9):
                made[field][0, 1, 3] += 2.0**-23

        sentence = f"NaN in 0 and a different result in 2 of {RUNS} runs"
        assert self.runs(change) == sentence

    def test_nothing_but_nan(self):
        sentence = f"NaN in {RUNS} and a different result in 0 of {RUNS} runs"
        assert self.runs(lambda n, made: made.out.fill_(float("nan"))) == sentence

    @pytest.mark.parametrize("field", [0, 1])
    def test_the_same_wrong_result_in_all(self, field: int):
        assert self.runs(lambda n, made: made[field].mul_(1.25)) == "2.5e-01 from float64"

    def test_a_refusal(self):
        q = torch.empty(1, 2, 8, 4)
        assert fault(lambda: None, q, self.exact) == "the compile check refuses it"


def test_room_is_full_of_nan():
    assert all(bool(x.isnan().all()) for x in room(torch.ones(1, 2, 8, 4)))


@specialised
@pytest.mark.parametrize("product", [False, True])
def test_all_windows_are_tried_in_all_ways(product: bool, monkeypatch: pytest.MonkeyPatch):
    """On a CPU, with a clock that stands."""
    tries: list[Way] = []
    wrong: list[Way] = []

    def run(qkv: Any, plan: BlockPlan, way: Way, *, product: bool) -> AttentionOutput | None:
        tries.append(way)
        found = real(qkv, plan, way, product=product)
        if way in wrong:
            assert found is not None
            found.lse[0, 0, 5] = float("nan")
        return found

    def clock(variants: dict[str, Callable[[], Any]], *_: Any, rounds: int) -> dict[str, Timing]:
        assert variants["it"]() is not None
        return {"it": Timing((1.25,) * rounds)}

    real = tune_masked.run
    monkeypatch.setattr(tune_masked, "run", run)
    monkeypatch.setattr(tune_masked, "problem", partial(problem, device="cpu"))
    monkeypatch.setattr(tune_masked, "time_interleaved", clock)
    monkeypatch.setattr(tune_masked, "WINDOWS", {True: (SMALL, SMALL)})
    monkeypatch.setattr(tune_masked, "RUNS", 2)
    monkeypatch.setattr(hopper, "chosen", lambda *_: "hopper")
    given = {"dtype": "float16", "head_dim": 16, "product": product, "ragged": True}
    assert tune_masked.measured(**given) == 1.25
    assert tries == [Way("hopper", False)] * 5
    wrong.append(Way("hopper", False))
    sentence = "hopper, running maxima: NaN in 2 and a different result in 0 of 2 runs"
    assert tune_masked.measured(**given) == sentence
