"""Calibrating a pipeline, and running what was found: end to end on tiny models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import dit_sparse
from dit_sparse.calibration import Calibration
from dit_sparse.calibration_solver import Settings
from dit_sparse.cli import app
from dit_sparse.grid import TokenGrid
from dit_sparse.methods.paro import ParoMethod
from dit_sparse.methods.schedule import Schedule
from dit_sparse.pipelines import calibrate as module
from dit_sparse.pipelines import observe
from dit_sparse.pipelines.identity import identity_of
from dit_sparse.pipelines.tiny import tiny_call

SETTINGS = Settings(segments=2, block=64, least_mass=0.0, order_steps=2)
SIZE = {"height": 128, "width": 192, "num_inference_steps": 4}  # 3 x 8 x 12 tokens, 5 blocks


def call(pipe: Any, family: str = "wan", seed: int = 0) -> dict[str, Any]:
    found = tiny_call(family, pipe, seed=seed) | SIZE
    return {name: value for name, value in found.items() if name != "generator"}


def run(pipe: Any, **changes: Any) -> Tensor:
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        return pipe(**(call(pipe) | changes), generator=noise)[0]


def calibrate(pipe: Any, prompts: int = 2, **changes: Any) -> Calibration:
    found = {"density": 0.7, "settings": SETTINGS, "progress": False} | changes
    return dit_sparse.calibrate(pipe, [call(pipe, seed=n) for n in range(prompts)], **found)


def paro(found: Calibration, folder: Path, tail: str = "none") -> ParoMethod:
    return ParoMethod(str(found.save_pretrained(folder)), tail)


def equal(a: Calibration, b: Calibration) -> bool:
    same = [torch.equal(a.masks[s], b.masks[s]) for s in a.masks]
    return torch.equal(a.orders, b.orders) and all(same) and torch.equal(a.kept_mass, b.kept_mass)


class TestWan:
    def test_calibrate_save_load_and_run(self, tiny: Any, tmp_path: Path):
        pipe = tiny("wan")
        stock = run(pipe)
        found = calibrate(pipe)
        assert torch.equal(run(pipe), stock), "nothing is left on the pipeline"
        assert (found.grid, found.steps, found.layers, found.heads) == (
            *(TokenGrid(3, 8, 12), 4, 2, 2),
        )
        assert found.provenance["generations"] == 2
        assert found.provenance["achieved_density"] == pytest.approx(0.7, abs=0.01)
        dit_sparse.apply(pipe, "paro", options={"path": str(found.save_pretrained(tmp_path))})
        sparse = run(pipe)
        ran = dit_sparse.summary(pipe)
        assert (ran.sparse, ran.dense) == (16, 0)  # 4 steps, 2 layers, 2 forwards a step
        assert ran.reused == 12  # a plan for each of 2 layers in 2 segments
        assert 0.5 < ran.density < 0.8
        assert sparse.isfinite().all()
        assert (sparse - stock).abs().max() > 1e-3
        assert torch.equal(run(pipe), sparse)

    @pytest.mark.parametrize("tail", ["none", "zeroth"])
    def test_density_one_is_dense(self, tail: str, tiny: Any, tmp_path: Path):
        pipe = tiny("wan")
        stock = run(pipe)
        found = calibrate(pipe, 1, density=1.0)
        dit_sparse.apply(pipe, paro(found, tmp_path, tail))
        torch.testing.assert_close(run(pipe), stock, atol=3e-5, rtol=0)
        assert dit_sparse.summary(pipe).dense == 0

    def test_orders_alone_change_nothing(self, tiny: Any, tmp_path: Path):
        """All blocks are read, every head in another order."""
        pipe = tiny("wan")
        stock = run(pipe)
        found = calibrate(pipe, 1, density=1.0)
        orders = torch.tensor([[2, 5], [3, 1]], dtype=torch.uint8)
        mixed = replace(found, orders=orders)
        dit_sparse.apply(pipe, paro(mixed, tmp_path))
        torch.testing.assert_close(run(pipe), stock, atol=3e-5, rtol=0)

    def test_the_more_is_read_the_nearer_it_is(self, tiny: Any, tmp_path: Path):
        pipe = tiny("wan")
        stock = run(pipe)
        errors = []
        for density in (0.6, 0.8, 0.95):
            dit_sparse.apply(pipe, paro(calibrate(pipe, 1, density=density), tmp_path))
            errors.append((run(pipe) - stock).abs().mean().item())
            dit_sparse.remove(pipe)
        assert errors == sorted(errors, reverse=True)

    def test_the_same_again(self, tiny: Any):
        pipe = tiny("wan")
        assert equal(calibrate(pipe), calibrate(pipe))

    def test_within_a_schedule(self, tiny: Any, tmp_path: Path):
        pipe = tiny("wan")
        dit_sparse.apply(pipe, Schedule(paro(calibrate(pipe), tmp_path), dense_first=1))
        run(pipe)
        assert (dit_sparse.summary(pipe).sparse, dit_sparse.summary(pipe).dense) == (12, 4)

    def test_by_mass_and_every_other_step(self, tiny: Any):
        settings = Settings(segments=1, block=64, every=2, order_steps=1)
        found = calibrate(tiny("wan"), density=None, mass=0.8, settings=settings)
        assert (found.kept_mass >= 0.8).all()


class TestOtherFamilies:
    @pytest.mark.parametrize("family", ["cogvideox", "hunyuan_video", "flux"])
    def test_text_in_the_sequence(self, family: str, tiny: Any, tmp_path: Path):
        pipe = tiny(family)
        size = tiny_call(family, pipe)
        more = {k: 4 * size[k] for k in ("height", "width") if k in size}
        arguments = {k: v for k, v in (size | more).items() if k != "generator"}

        def sample() -> Tensor:
            with torch.no_grad():
                return pipe(**arguments, generator=torch.Generator().manual_seed(0))[0]

        stock = sample()
        found = dit_sparse.calibrate(
            pipe, [arguments], density=1.0, settings=SETTINGS, progress=False
        )
        assert found.provenance["text"] > 0
        dit_sparse.apply(pipe, paro(found, tmp_path))
        torch.testing.assert_close(sample(), stock, atol=1e-4, rtol=0)
        assert dit_sparse.summary(pipe).dense == 0

    def test_two_transformers_are_calibrated_in_turn(self, tiny: Any, tmp_path: Path):
        pipe = tiny("wan2.2")
        with pytest.raises(ValueError, match=r"among transformer, transformer_2, got None"):
            calibrate(pipe)
        methods = {}
        for name in ("transformer", "transformer_2"):
            settings = Settings(segments=4, block=64, least_mass=0.0)
            found = calibrate(pipe, 1, component=name, settings=settings)
            assert set(found.masks) < set(range(4)), "each runs some of the steps"
            methods[name] = paro(found, tmp_path / name)
        dit_sparse.apply(pipe, methods)
        run(pipe)
        assert dit_sparse.summary(pipe).dense == 0
        dit_sparse.apply(pipe, dict.fromkeys(methods, methods["transformer"]))
        with pytest.raises(ValueError, match="Expected a step that the calibration has seen"):
            run(pipe)


class TestInterrupted:
    @pytest.fixture
    def broken(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
        """Stops the third generation in its middle, once."""
        runs: list[int] = []
        stock = observe._run

        def stops(pipe: Any, name: str, observer: Any, arguments: Any) -> None:
            runs.append(len(runs))
            if len(runs) == 3:
                arguments = {**arguments, "callback_on_step_end": interrupt}
            stock(pipe, name, observer, arguments)

        def interrupt(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
            if step == 1:
                raise KeyboardInterrupt
            return {}

        monkeypatch.setattr(observe, "_run", stops)
        return runs

    def test_it_goes_on(self, broken: list[int], tiny: Any, tmp_path: Path):
        pipe = tiny("wan")
        with pytest.raises(KeyboardInterrupt):
            calibrate(pipe, folder=tmp_path)
        assert (tmp_path / module.PROGRESS).exists()
        got = calibrate(pipe, folder=tmp_path)
        assert len(broken) == 4, "the two that were finished did not run again"
        assert not (tmp_path / module.PROGRESS).exists()
        assert equal(got, calibrate(pipe))

    def test_with_other_prompts_it_is_refused(self, broken: list[int], tiny: Any, tmp_path: Path):
        pipe = tiny("wan")
        with pytest.raises(KeyboardInterrupt):
            calibrate(pipe, folder=tmp_path)
        with pytest.raises(ValueError, match=r"Expected to go on .* where prompts is"):
            calibrate(pipe, 3, folder=tmp_path)
        assert calibrate(pipe, folder=tmp_path, density=0.9).provenance["target"]["density"] == 0.9


class TestRefusals:
    @pytest.mark.parametrize("prompts", [[], [""], "a cat", [{}]], ids=str)
    def test_prompts(self, prompts: Any, tiny: Any):
        with pytest.raises(ValueError, match="Expected one or more prompts to calibrate with"):
            dit_sparse.calibrate(tiny("wan"), prompts, density=0.3)

    def test_an_argument_that_the_pipeline_does_not_take(self, tiny: Any):
        with pytest.raises(ValueError, match="WanPipeline takes, got 'hight'"):
            calibrate(tiny("wan"), call={"hight": 64})

    def test_a_transformer_alone(self, tiny: Any):
        with pytest.raises(ValueError, match="Give the pipeline that will run it"):
            dit_sparse.calibrate(tiny("wan").transformer, ["a cat"], density=0.3)

    def test_a_pipeline_that_is_sparse(self, tiny: Any):
        pipe = dit_sparse.apply(tiny("wan"), "window")
        with pytest.raises(ValueError, match=r"Call dit_sparse\.remove\(\) first"):
            calibrate(pipe)

    def test_a_density_that_forced_blocks_exceed_stops_at_the_first_call(self, tiny: Any):
        pipe = tiny("wan")
        stock = run(pipe)
        with pytest.raises(ValueError, match=r"Expected a density of at least 0\.36"):
            calibrate(pipe, density=0.1)
        assert torch.equal(run(pipe), stock)

    def test_more_segments_than_steps(self, tiny: Any):
        with pytest.raises(ValueError, match=r"1 to 4 segments of 4 steps .*got 5"):
            calibrate(tiny("wan"), settings=Settings(segments=5, block=64))

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"height": 64}, r"3x8x12 tokens, got 3x4x12\. Use the height, width and frames"),
            ({"num_inference_steps": 3}, r"Expected the 4 denoising steps .* of 3\."),
        ],
        ids=str,
    )
    def test_another_run_than_the_calibrated_one(
        self, change: dict[str, int], sentence: str, tiny: Any, tmp_path: Path
    ):
        pipe = tiny("wan")
        dit_sparse.apply(pipe, paro(calibrate(pipe, 1), tmp_path))
        with pytest.raises(ValueError, match=sentence):
            run(pipe, **change)

    def test_another_model(self, tiny: Any, tmp_path: Path):
        method = paro(calibrate(tiny("wan"), 1), tmp_path)
        for spec in (method, Schedule(method, dense_first=1)):
            other = tiny("cogvideox")
            with pytest.raises(
                ValueError, match=r"got CogVideoXTransformer3DModel.*Calibrate this"
            ):
                dit_sparse.apply(other, spec)
            with pytest.raises(ValueError, match="without"):
                dit_sparse.summary(other)


class TestIdentity:
    def test_the_configuration_counts_and_not_where_it_lies(self, tiny: Any):
        one, two = tiny("wan").transformer, tiny("wan").transformer
        two.register_to_config(_name_or_path="some/folder/transformer")
        assert identity_of(one).agrees(identity_of(two))
        assert identity_of(two).name == "transformer"
        two.register_to_config(eps=1e-5)
        assert not identity_of(one).agrees(identity_of(two))

    def test_a_repository_is_read_from_the_cache_s_path(self, tiny: Any):
        transformer = tiny("wan").transformer
        commit = "0123456789" * 4
        transformer.register_to_config(
            _name_or_path=f"hub/models--Owner--Name-1.3B/snapshots/{commit}/transformer"
        )
        found = identity_of(transformer)
        assert (found.name, found.revision) == ("Owner/Name-1.3B", commit)


class TestCommand:
    WORDS = ("--device", "cpu", "--height", "128", "--width", "192", "--frames", "9", "--quiet")

    def invoke(self, *words: str) -> Any:
        result = CliRunner().invoke(app, list(words))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    def calibrate(self, folder: Path, *words: str) -> Any:
        prompts = folder / "prompts.txt"
        prompts.write_text("a cat\n\na street\n")
        given = ("calibrate", "tiny:wan", "--prompts", str(prompts), "--steps", "4", *self.WORDS)
        return self.invoke(*given, "-o", str(folder / "out"), "--block", "64", *words)

    def test_calibrate_and_sample(self, tmp_path: Path):
        words = ("--density", "0.7", "--least-mass", "0", "--format", "json")
        result = self.calibrate(tmp_path, *words)
        assert result.exit_code == 0, result.stderr
        report = json.loads(result.stdout)
        assert report["grid"] == [3, 8, 12]
        assert report["density"] == pytest.approx(0.7, abs=0.01)
        assert sum(report["orders"].values()) == 4
        assert Calibration.from_pretrained(tmp_path / "out").model.name == "tiny:wan"
        option = ("--option", f"path={tmp_path / 'out'}", "--warmup", "0")
        sample = ("sample", "--model", "tiny:wan", "--method", "paro", *option, *self.WORDS)
        output = ("-o", str(tmp_path / "x.gif"))
        result = self.invoke(*sample, *output, "--steps", "4")
        assert result.exit_code == 0, result.stderr
        result = self.invoke(*sample, *output, "--steps", "2")
        assert (result.exit_code, result.stdout) == (2, "")
        assert "Expected the 4 denoising steps of the calibration" in result.stderr

    def test_the_report_lists_dense_heads(self, tmp_path: Path):
        result = self.calibrate(tmp_path, "--density", "0.7", "--least-mass", "1")
        assert result.exit_code == 0, result.stderr
        assert "dense in segment 3: 0.0 0.1 1.0 1.1" in result.stdout
        assert f"--method paro --option path={tmp_path / 'out'}" in result.stdout

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            ((), "Expected a density or a mass to calibrate for"),
            (("--density", "0.7", "--method", "window"), "Expected --method among paro"),
            (("--density", "0.7", "--split", "thirds"), "Expected split among uniform, halves"),
            (("--density", "0.1"), "Expected a density of at least 0.36"),
            (("--density", "0.7", "--segments", "9"), "Expected 1 to 4 segments of 4 steps"),
        ],
        ids=str,
    )
    def test_bad_input_is_a_sentence(self, words: tuple[str, ...], sentence: str, tmp_path: Path):
        result = self.calibrate(tmp_path, *words)
        assert (result.exit_code, result.stdout) == (2, "")
        assert sentence in result.stderr

    def test_no_prompts(self, tmp_path: Path):
        (tmp_path / "empty.txt").write_text("\n")
        words = ("calibrate", "tiny:wan", "--density", "0.5", "-o", str(tmp_path))
        result = self.invoke(*words, "--prompts", str(tmp_path / "empty.txt"))
        assert result.exit_code == 2
        assert "Expected one prompt a line" in result.stderr
        result = self.invoke(*words, "--prompts", str(tmp_path / "none.txt"))
        assert result.exit_code == 2
        assert "Expected --prompts to be a UTF-8 text file" in result.stderr
