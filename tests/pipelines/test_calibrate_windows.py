"""Searching windows while a pipeline runs, and running what was found: end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import dit_sparse
from dit_sparse.cli import app
from dit_sparse.grid import TokenGrid
from dit_sparse.pipelines import calibrate_windows as module
from dit_sparse.pipelines import observe
from dit_sparse.pipelines.calibrate_windows import calibrate_windows
from dit_sparse.pipelines.tiny import tiny_call
from dit_sparse.window_table import TABLE, WindowTable, load_table, save_table
from dit_sparse.window_tally import WindowBudget, WindowSettings

SETTINGS = WindowSettings(segments=2, block=64, tile=(1, 4, 4))
SIZE = {"height": 128, "width": 192, "num_inference_steps": 4}  # 3 x 8 x 12 tokens


def call(pipe: Any, seed: int = 0) -> dict[str, Any]:
    found = tiny_call("wan", pipe, seed=seed) | SIZE
    return {name: value for name, value in found.items() if name != "generator"}


def run(pipe: Any, **changes: Any) -> Tensor:
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        return pipe(**(call(pipe) | changes), generator=noise)[0]


def search(pipe: Any, prompts: int = 1, **changes: Any) -> WindowTable:
    found = {"density": 0.5, "settings": SETTINGS, "progress": False} | changes
    return calibrate_windows(pipe, [call(pipe, n) for n in range(prompts)], **found)


def test_search_save_and_run(tiny: Any, tmp_path: Path):
    pipe = tiny("wan")
    stock = run(pipe)
    found = search(pipe)
    assert torch.equal(run(pipe), stock), "nothing is left on the pipeline"
    assert (found.grid, found.segments) == (TokenGrid(3, 8, 12), (0, 0, 1, 1))
    assert (len(found.windows), found.layers, found.heads) == (2, 2, 2)
    assert 0.2 < found.density <= 0.5
    assert found.provenance["costs"]["source"].startswith("estimated")
    assert len(found.provenance["candidates"]) == 8  # 1 or 3 frames, 1 or 2 rows, 1 or 3 columns
    save_table(found, tmp_path / TABLE)
    assert load_table(tmp_path) == replace(found, provenance=load_table(tmp_path).provenance)
    dit_sparse.apply(pipe, "sta", options={"table": str(tmp_path), "block": 64})
    sparse = run(pipe)
    ran = dit_sparse.summary(pipe)
    assert (ran.sparse, ran.dense) == (16, 0)  # 4 steps, 2 layers, 2 forwards a step
    assert ran.reused == 12  # a plan for each of 2 layers in 2 segments
    assert ran.density == pytest.approx(found.density, abs=0.01)
    assert (sparse - stock).abs().max() > 1e-4


def test_windows_of_everything_are_dense(tiny: Any, tmp_path: Path):
    pipe = tiny("wan")
    stock = run(pipe)
    found = search(pipe, density=1.0)
    assert found.error < 1e-10
    dit_sparse.apply(pipe, "sta", options={"table": str(save_table(found, tmp_path / "x"))})
    torch.testing.assert_close(run(pipe), stock, atol=3e-5, rtol=0)


def test_a_budget_of_time(tiny: Any):
    settings = replace(SETTINGS, tile=(1, 8, 6))
    found = search(tiny("wan"), density=None, time=0.8, settings=settings)
    assert found.provenance["cost"] <= 0.8
    costs = [row["cost"] for row in found.provenance["candidates"]]
    assert min(costs) < 0.8 < max(costs)


def test_own_candidates_and_tiles_for_the_grid(tiny: Any):
    settings = WindowSettings(segments=1, block=64, every=2, windows=((1, 1, 1), (3, 2, 3)))
    found = search(tiny("wan"), settings=settings)
    assert found.tile == (3, 4, 4)
    assert {w for heads in found.windows[0] for w in heads} <= {(1, 1, 1), (3, 2, 3)}


def test_each_transformer_has_its_steps(tiny: Any, tmp_path: Path):
    pipe = tiny("wan2.2")
    methods = {}
    for name in ("transformer", "transformer_2"):
        found = search(pipe, component=name, settings=replace(SETTINGS, segments=4))
        assert () in found.windows
        path = save_table(found, tmp_path / name)
        methods[name] = dit_sparse.methods.create("sta", {"table": str(path)})
    dit_sparse.apply(pipe, methods)
    run(pipe)
    assert dit_sparse.summary(pipe).dense == 0
    dit_sparse.apply(pipe, dict.fromkeys(methods, methods["transformer"]))
    with pytest.raises(ValueError, match="Expected a step that the search has seen"):
        run(pipe)


def test_interrupted_it_goes_on(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipe, runs, stock = tiny("wan"), [], observe._run

    def stops(*arguments: Any) -> None:
        runs.append(len(runs))
        if len(runs) == 2:
            raise KeyboardInterrupt
        stock(*arguments)

    monkeypatch.setattr(observe, "_run", stops)
    with pytest.raises(KeyboardInterrupt):
        search(pipe, 2, folder=tmp_path)
    assert (tmp_path / module.PROGRESS).exists()
    with pytest.raises(ValueError, match=r"Expected to go on .* where segments is 2, got 1"):
        search(pipe, 2, folder=tmp_path, settings=replace(SETTINGS, segments=1))
    with pytest.raises(ValueError, match=r"Expected to go on .* where model is .* got"):
        search(pipe, 2, folder=tmp_path, model="someone/fine-tuned")
    got = search(pipe, 2, folder=tmp_path)
    assert len(runs) == 3, "what was finished did not run again"
    assert not (tmp_path / module.PROGRESS).exists()
    assert got == search(pipe, 2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"height": 64}, r"Expected the grid 3x8x12 and 2 layers, .* got 3x4x12"),
        ({"num_inference_steps": 3}, "Expected the 4 denoising steps for which .* of 3"),
    ],
    ids=str,
)
def test_another_run(change: dict[str, int], sentence: str, tiny: Any, tmp_path: Path):
    pipe = tiny("wan")
    path = save_table(search(pipe), tmp_path / "x")
    dit_sparse.apply(pipe, "sta", options={"table": str(path)})
    with pytest.raises(ValueError, match=sentence):
        run(pipe, **change)


def test_another_model(tiny: Any, tmp_path: Path):
    path = save_table(search(tiny("wan")), tmp_path / "x")
    with pytest.raises(ValueError, match=r"Expected the model of the windows in .* got CogVideoX"):
        dit_sparse.apply(tiny("cogvideox"), "sta", options={"table": str(path)})


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: WindowBudget(), "Expected a density or a time"),
        (lambda: WindowBudget(0.3, 0.3), "Expected a density or a time"),
        (lambda: WindowBudget(time=1.5), "Expected a time above 0 and at most 1, got 1.5"),
        (lambda: WindowSettings(every=0), "every to be an integer of at least 1, got 0"),
        (lambda: WindowSettings(tile=(1, 0, 4)), "tile along height"),
        (lambda: WindowSettings(windows=((1, 1, 0),)), "window along width of at least 1 tile"),
    ],
)
def test_refuses(make: Any, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        make()


class TestCommand:
    WORDS = ("--device", "cpu", "--height", "128", "--width", "192", "--frames", "9", "--quiet")

    def invoke(self, *words: str) -> Any:
        result = CliRunner().invoke(app, list(words))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    def calibrate(self, folder: Path, *words: str) -> Any:
        prompts = folder / "prompts.txt"
        prompts.write_text("a cat\n")
        given = ("calibrate", "tiny:wan", "--prompts", str(prompts), "--steps", "2", *self.WORDS)
        return self.invoke(*given, "-o", str(folder / "out"), "--method", "sta", *words)

    def test_calibrate_and_sample(self, tmp_path: Path):
        words = ("--density", "0.6", "--segments", "2", "--block", "64", "--tile", "1x4x4")
        more = ("--window", "1x1x1", "--window", "3x2x3", "--format", "json")
        result = self.calibrate(tmp_path, *words, *more)
        assert result.exit_code == 0, result.stderr
        report = json.loads(result.stdout)
        assert (report["grid"], report["tile"]) == ([3, 8, 12], [1, 4, 4])
        assert sum(report["windows"].values()) == 8  # 2 segments, 2 layers, 2 heads
        assert set(report["windows"]) <= {"1x1x1", "3x2x3"}
        assert len(report["candidates"]) == 2
        option = ("--option", f"table={tmp_path / 'out'}", "--warmup", "0", "--steps", "2")
        sample = ("sample", "--model", "tiny:wan", "--method", "sta", *option, *self.WORDS)
        result = self.invoke(*sample, "-o", str(tmp_path / "x.gif"))
        assert result.exit_code == 0, result.stderr

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            ((), "Expected a density or a time as the budget"),
            (("--density", "0.6", "--mass", "0.5"), "--mass, which is for paro"),
            (("--density", "0.01"), "Expected a budget of at least 0."),
            (("--time", "0.5", "--window", "3x0x3"), "window along height of at least 1 tile"),
            (("--density", "0.6", "--segments", "9"), "Expected 1 to 2 segments of 2 steps"),
        ],
        ids=str,
    )
    def test_bad_input_is_a_sentence(self, words: tuple[str, ...], sentence: str, tmp_path: Path):
        result = self.calibrate(tmp_path, "--segments", "1", *words)
        assert (result.exit_code, result.stdout) == (2, "")
        assert sentence in result.stderr
