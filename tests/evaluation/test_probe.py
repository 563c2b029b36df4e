"""What the probes say of single calls, against explicit softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse.attention import attend
from dit_sparse.commands.models import Model
from dit_sparse.evaluation import probe as probing
from dit_sparse.evaluation.probe import CallProbe, TimeProbe, block_maps, probe
from dit_sparse.evaluation.variants import baselines_of, variants_of
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.method import CallContext
from dit_sparse.methods.pisa import PisaMethod
from dit_sparse.methods.schedule import Schedule
from dit_sparse.methods.window import WindowMethod
from dit_sparse.pipelines.tiny import tiny_call, tiny_pipeline


def call(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, CallContext]:
    torch.manual_seed(seed)
    layout = TokenLayout.of(TokenGrid(4, 8, 8))
    q, k, v = torch.randn(3, 2, 3, 256, 16).unbind()
    return q * 2, k, CallContext(layout, layer=1, layers=3, step=2, steps=5, values=v)


def looked_at(methods: dict[str, Any]) -> dict[str, dict[str, Any]]:
    q, k, context = call()
    found = CallProbe(methods, frozenset({2}))
    assert found.dense_reason(context) is None
    found.plan(q, k, context)
    assert found.dense_reason(context) is not None, "a call is looked at once"
    return {line["variant"]: line for line in found.lines}


def test_error_and_kept_mass_are_those_of_the_masked_softmax() -> None:
    method = WindowMethod(density=0.3, block=64)
    line = looked_at({"w": method})["w"]
    q, k, context = call()
    mask = method.plan(q, k, context).to_mask()
    scores = q @ k.transpose(-1, -2) / 4
    weights = scores.softmax(-1)
    v = context.values
    dense, sparse = weights @ v, scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    apart, whole = ((x**2).sum((0, 2, 3)) for x in (sparse - dense, dense))
    error = (apart / whole).sqrt()
    kept = (weights * mask).sum(-1).mean((0, 2))
    assert line["error"] == pytest.approx(error.tolist(), abs=1e-4)
    assert line["kept"] == pytest.approx(kept.tolist(), abs=1e-4)
    assert 0 < line["density"] < 1
    assert min(line["error"]) > 0
    assert (line["layer"], line["step"], line["steps"]) == (1, 2, 5)


def test_what_reads_everything_has_no_error() -> None:
    line = looked_at({"w": WindowMethod(density=1.0, block=64)})["w"]
    assert max(line["error"]) < 1e-4
    assert line["kept"] == pytest.approx([1.0] * 3, abs=1e-4)


def test_a_tail_lowers_the_error_and_keeps_no_more_mass() -> None:
    common = {"density": 0.5, "block": 64}
    found = looked_at(
        {tail: PisaMethod(**common, tail=tail) for tail in ("none", "zeroth", "first")}
    )
    assert found["zeroth"]["kept"] == pytest.approx(found["none"]["kept"], abs=1e-5)
    assert max(found["zeroth"]["kept"]) < 1
    assert found["zeroth"]["error"] != found["none"]["error"]


def test_a_method_that_fails_does_not_stop_the_others() -> None:
    found = looked_at({"bad": PisaMethod(density=0.01), "good": WindowMethod(block=64)})
    assert "Expected a density" in found["bad"]["failed"]
    assert "error" in found["good"]


def test_what_is_not_a_number_is_no_small_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **precision: Any) -> Any:
        result = attend(*given, **precision)
        result.out[0, 1, 3] = torch.nan
        return result

    found = looked_at({"w": WindowMethod(block=64)})["w"]
    assert "failed" not in found
    true = probing.CallProbe._compare

    def compare(*given: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(probing, "attend", broken)
            return true(*given)

    monkeypatch.setattr(probing.CallProbe, "_compare", compare)
    assert "finite" in looked_at({"w": WindowMethod(block=64)})["w"]["failed"]


def test_dense_calls_of_a_schedule_are_left_out() -> None:
    window = WindowMethod(block=64)
    found = looked_at(
        {
            "first": Schedule(window, dense_first=3),
            "layer": Schedule(window, dense_layers=(1,)),
            "neither": Schedule(window, dense_first=2, dense_layers=(0,)),
        }
    )
    assert set(found) == {"neither"}


def test_times_are_taken_of_kernel_and_plan() -> None:
    q, k, context = call()
    timing = TimeProbe({"w": WindowMethod(block=64), "bad": PisaMethod(density=0.01)}, 2, 1)
    assert timing.dense_reason(context) is None
    timing.plan(q, k, context)
    lines = {line["variant"]: line for line in timing.lines}
    assert lines[""]["shape"] == [2, 3, 256, 16]
    assert "failed" in lines["bad"]
    assert all(lines["w"][name] > 0 for name in ("dense_ms", "kernel_ms", "plan_ms"))
    blocks = WindowMethod(block=64).plan(q, k, context).k_blocks.n
    assert timing.maps["w"].shape == (3, 2, blocks, blocks)


def test_block_maps_hold_all_mass() -> None:
    q, k, context = call()
    plan = WindowMethod(density=0.3, block=64).plan(q, k, context)
    maps = torch.from_numpy(block_maps(q, k, plan)).float()
    assert maps[:, 0].sum(-1).sub(1).abs().max() < 1e-2
    read = plan.visited[0, 0].float()
    torch.testing.assert_close(maps[:, 1], read.expand(3, -1, -1))


def test_probing_changes_nothing_and_sees_every_layer() -> None:
    pipe = tiny_pipeline("wan")
    call = tiny_call("wan", pipe)
    call.pop("generator")
    call.pop("output_type")
    pipe.set_progress_bar_config(disable=True)
    model = Model("tiny:wan", pipe, lambda *_: {})
    variants = (*baselines_of(["dense"]), *variants_of(["window:density=0.5:block=64"]))

    def run() -> torch.Tensor:
        noise = torch.Generator("cpu").manual_seed(0)
        return pipe(**call, generator=noise, output_type="latent").frames

    before = run()
    lines, maps = probe(model, variants, call, 0, [0.0, 1.0], steps=2)
    torch.testing.assert_close(run(), before)
    seen = [(line["layer"], line["step"]) for line in lines if line["kind"] == "call"]
    assert sorted(seen) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert set(maps) == {"window density=0.5 block=64"}
    assert probe(model, variants[:2], call, 0, [0.5], steps=2) == ([], {})
