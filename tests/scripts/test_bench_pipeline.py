"""The full-size models that are timed, and the methods that random weights cannot flatter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

import dit_sparse
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.method import CallContext
from dit_sparse.pipelines.family import family_of
from dit_sparse.pipelines.install import attention_modules
from dit_sparse.pipelines.tiny import tiny_pipeline
from scripts import bench_pipeline
from scripts.bench_pipeline import chooser
from scripts.step_bench import DENSE, Bench, Run, on_line, rows
from scripts.step_models import MODELS, Model
from scripts.step_rows import WHOLE, Case, Rows
from scripts.step_variants import NAMES, names, paro_method, variants
from scripts.supervision import Progress, supervise

#: Published parameters of the transformers, in billions.
SIZES = {"wan-1.3b": 1.42, "wan-14b": 14.3, "flux": 11.9, "hunyuan": 12.8, "cogvideox-5b": 5.57}
#: Tokens of the picture and of the text in its sequence.
TOKENS = {
    "wan-1.3b-480p": (32_760, 0),
    "wan-14b-720p": (75_600, 0),
    "flux-1024": (4_096, 512),
    "flux-4096": (65_536, 512),
    "hunyuan-720p": (118_800, 256),
    "cogvideox-5b": (17_550, 226),
}


def test_variants_are_what_their_names_say() -> None:
    found = dict(variants([0.2]))
    assert [*found, "paro 0.2"] == names([0.2])
    sampled, means = found["psa 0.2"], found["psa-means 0.2"]
    assert (sampled.importance, means.importance) == ("sampled", "means")
    assert sampled.ends == means.ends
    tails = [found[f"{name} 0.2"].tail for name in ("pisa-zeroth", "pisa")]
    assert tails == ["zeroth", "first"]


@pytest.mark.parametrize("name", MODELS)
def test_models_are_the_published_ones(name: str) -> None:
    model = MODELS[name]
    with torch.device("meta"):
        transformer, inputs = model.build(model.units), model.inputs()
    billions = sum(p.numel() for p in transformer.parameters()) / 1e9
    wanted = next(size for prefix, size in SIZES.items() if name.startswith(prefix))
    assert billions == pytest.approx(wanted, rel=0.01)
    modules = attention_modules(transformer, family_of(transformer))
    assert len(modules) == model.layers(model.units)
    first = next(iter(modules.values()))
    assert (first.heads, first.to_q.out_features) == (model.heads, model.heads * model.head_dim)
    picture, text = TOKENS.get(name, (model.grid.length, model.text))
    assert (model.grid.length, model.tokens) == (picture, picture + text)
    assert inputs


@pytest.mark.parametrize("name", MODELS)
def test_every_block_is_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = MODELS[name], []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: found.append(self))
    bench = Bench.build(model, 2, torch.device("meta"))
    bench.compile()
    blocks = {block for stack in model.stacks for block in getattr(bench.transformer, stack)}
    assert len(blocks) == model.layers(2)
    assert blocks <= {*found}


@pytest.mark.parametrize("density", [0.1, 0.25])
def test_what_looks_at_q_and_k_has_the_density_of_its_name(density: float) -> None:
    layout = TokenLayout.of(TokenGrid(8, 32, 32))  # 64 blocks of 128
    context = CallContext(layout, step=0, steps=1)
    found = dict(variants([density]))
    assert set(found) == {f"{name} {density}" for name in NAMES if name != "paro"}
    for seed in (0, 1):
        torch.manual_seed(seed)
        q, k = torch.randn(2, 1, 2, layout.length, 16) * 3
        pisa = found[f"pisa {density}"].plan(q, k, context)
        psa = found[f"psa {density}"].plan(q, k, context)
        assert pisa.density == pytest.approx(density, abs=0.03)
        assert psa.density == pytest.approx(density, abs=0.03)


def test_paro_runs_random_masks_of_the_density(tmp_path: Path) -> None:
    transformer = tiny_pipeline("wan").transformer
    method = paro_method(transformer, TokenGrid(4, 16, 16), 2, 2, 0.25, tmp_path)
    dit_sparse.apply(transformer, method, steps=1)
    with torch.no_grad():
        transformer(
            hidden_states=torch.randn(1, 16, 4, 32, 32),
            timestep=torch.tensor([500.0]),
            encoder_hidden_states=torch.randn(1, 7, 32),
        )
    assert dit_sparse.summary(transformer).density == pytest.approx(0.25)


def test_rows_say_how_much_of_the_ideal_was_reached() -> None:
    run = Run(times=[50.0, 40.0, 60.0], first=(70.0, 50.0), density=0.2)
    found = run.record(share=0.5, fastest=75.0)
    assert (found["ms"], found["plan_ms"], found["speedup"]) == (50.0, 20.0, 1.5)
    assert found["ideal"] == pytest.approx(1 / 0.6, abs=1e-3)
    assert found["of_ideal"] == pytest.approx(0.9)
    assert (found["rounds"], found["spread"]) == (3, 0.2)


def test_two_depths_give_the_time_of_all_layers() -> None:
    assert on_line((2, 4), (30.0, 50.0), 40) == 410.0
    assert on_line((30,), (7.0,), 30) == 7.0


def test_depths_whose_times_do_not_differ_give_no_estimate() -> None:
    run = Run(times=[25.0, 600.0, 20.0], deepest=[29.0, 30.0, 31.0])
    run.check(estimated=True)
    assert run.times == []
    assert "more --units" in str(run.failure)


def small(units: int = 8) -> Model:
    def build(units: int) -> nn.Module:
        return WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            ffn_dim=16,
            num_layers=units,
            text_dim=8,
            freq_dim=16,
        )

    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 16, 3, 32, 32),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, 5, 8),
        }

    return Model(build, inputs, {"blocks": 1}, units, 2, 16, TokenGrid(3, 16, 16))


@pytest.fixture
def bench() -> Bench:
    return Bench.build(small(), 4, torch.device("cpu"))


@torch.no_grad()
def test_a_few_layers_stand_for_all(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of variant runs at both depths, and the estimate is of the published depth."""
    true, depths = Bench._forward, []

    def forward(self: Bench) -> float:
        true(self)
        depths.append(len(self.transformer.blocks))  # type: ignore[arg-type]
        return 5.0 + 10 * depths[-1]

    monkeypatch.setattr(Bench, "_forward", forward)
    progress = Progress(tmp_path / "progress.json")
    progress.begin(Case("small", False))
    wanted = [*DENSE, *names([0.5])]
    choose = chooser(bench, [0.5], tmp_path)
    runs = bench.time(wanted, choose, 2, 60.0, progress)
    assert {v: run.failure for v, run in runs.items() if run.failure} == {}
    assert all(run.times == [85.0, 85.0] for run in runs.values())
    assert set(depths) == {2, 4}
    assert len(bench.transformer.blocks) == 4, "the transformer is whole again"
    assert runs["paro 0.5"].density == pytest.approx(0.5)
    found = {row["variant"]: row for row in rows(bench, runs, attention=1.0)}
    assert list(found) == wanted
    row = found["window 0.5"]
    assert (row["layers"], row["timed_layers"], row["estimated"]) == (8, [2, 4], True)
    assert (row["ms"], row["speedup"]) == (85.0, 1.0)


@torch.no_grad()
def test_a_variant_that_fails_leaves_the_others(tmp_path: Path) -> None:
    bench = Bench.build(small(2), 0, torch.device("cpu"))
    progress = Progress(tmp_path / "progress.json")
    progress.begin(Case("small", False))
    choose = chooser(bench, [0.5, 0.001], tmp_path)
    runs = bench.time([*DENSE, "pisa 0.001", "window 0.5"], choose, 1, 60.0, progress)
    found = {row["variant"]: row for row in rows(bench, runs, attention=1.0)}
    assert "Expected" in found["pisa 0.001"]["failed"]
    assert found["window 0.5"]["ms"] > 0
    without = {k: v for k, v in runs.items() if k not in DENSE}
    assert all(
        "no dense variant" in r["failed"] or "Expected" in r["failed"]
        for r in rows(bench, without, attention=1.0)
    )


def test_units_that_are_no_depth_are_refused() -> None:
    with pytest.raises(ValueError, match="from 2 to 8"):
        Bench.build(small(), 1, torch.device("cpu"))
    assert Bench.build(small(2), 0, torch.device("cpu")).depths == (2,)


def test_rows_that_are_there_are_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two modes of a model share its weights; a later density is compared with dense runs anew."""
    monkeypatch.setattr(bench_pipeline, "MODELS", {"small": small(2)})
    monkeypatch.setattr(Bench, "compile", lambda _: None)  # takes long, and not here
    built, true = [], Bench.build.__func__  # type: ignore[attr-defined]

    def build(*arguments: Any) -> Bench:
        built.append(arguments)
        return true(Bench, *arguments)

    monkeypatch.setattr(Bench, "build", build)
    words = ["--output", str(tmp_path / "rows.jsonl"), "--progress", str(tmp_path / "now.json")]
    words += ["--rounds", "1", "--units", "0"]
    arguments = bench_pipeline.parser().parse_args([*words, "--densities", "0.5"])
    arguments.models = ["small"]
    for densities, count in (([0.5], 1), ([0.5], 1), ([0.5, 1.0], 2)):
        arguments.densities = densities
        bench_pipeline.measure(arguments, torch.device("cpu"))
        assert len(built) == count
    found = Rows(tmp_path / "rows.jsonl").all()
    assert all("ms" in row for row in found), found
    for compiled in (False, True):
        own = [row["variant"] for row in found if row["compiled"] == compiled]
        first = [*DENSE, *names([0.5])]
        assert own == [*first, *names([1.0])]
    assert found[0]["environment"]["torch"] == torch.__version__
    arguments.minutes = 0.0
    arguments.densities = [0.25]
    bench_pipeline.measure(arguments, torch.device("cpu"))
    assert len(Rows(tmp_path / "rows.jsonl").all()) == len(found), "no time is left"


class TestRows:
    case = Case("small", False)

    def test_what_is_there_is_not_missing(self, tmp_path: Path) -> None:
        found = Rows(tmp_path / "rows.jsonl")
        assert found.missing(self.case, ["stock", "dense"]) == ["stock", "dense"]
        found.append(self.case, {"variant": "stock", "ms": 1.0})
        found.append(self.case, {"variant": "dense", "failed": "no memory"})
        assert found.missing(self.case, ["stock", "dense", "window 0.2"]) == ["window 0.2"]
        assert found.failed(self.case) == {"dense"}
        assert found.missing(Case("small", True), ["stock"]) == ["stock"]
        found.drop([self.case])
        assert found.missing(self.case, ["stock"]) == ["stock"]

    def test_a_model_that_cannot_be_built_is_left_out(self, tmp_path: Path) -> None:
        found = Rows(tmp_path / "rows.jsonl")
        found.append(self.case, {"variant": WHOLE, "failed": "no memory"})
        assert found.missing(self.case, ["stock"]) == []

    def test_a_line_that_was_cut_short_swallows_no_other(self, tmp_path: Path) -> None:
        found = Rows(tmp_path / "rows.jsonl")
        found.append(self.case, {"variant": "stock"})
        found.path.write_text(found.path.read_text()[:-5])
        found.append(self.case, {"variant": "dense"})
        assert [row["variant"] for row in found.all()] == ["dense"]


WORKER = """
import sys, time
from pathlib import Path
from scripts.step_rows import Case, Rows
from scripts.supervision import Progress
progress, found, case = Progress(Path(sys.argv[1])), Rows(Path(sys.argv[2])), Case("m", True)
if not found.missing(case, ["a", "b", "c"]):
    sys.exit()
progress.begin(case)
for variant in found.missing(case, ["a", "b", "c"]):
    progress.tell(variant)
    if variant == "a":
        time.sleep(60)
    if variant == "b":
        sys.exit(5)
    found.append(case, {"variant": variant, "ms": 1.0})
"""


def test_what_hangs_or_breaks_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    progress, found = tmp_path / "progress.json", Rows(tmp_path / "rows.jsonl")
    command = [sys.executable, "-c", WORKER, str(progress), str(found.path)]
    for case, variant, why in supervise(command, progress, 2.0, 60.0):
        found.append(case, {"variant": variant, "failed": why})
    assert [(row["variant"], row.get("failed")) for row in found.all()] == [
        ("a", "there was no progress in 2 seconds"),
        ("b", "the process ended with code 5"),
        ("c", None),
    ]


def test_what_never_begins_is_not_tried_for_ever(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit(1)"]
    with pytest.raises(RuntimeError, match="code 1"):
        list(supervise(command, tmp_path / "progress.json", 5.0, 60.0))
