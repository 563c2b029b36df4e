"""Embedded models: found by name, whole or refused with a sentence, and sampled with sense."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from imageio import v3 as iio
from safetensors import safe_open
from typer.testing import CliRunner

import dit_sparse
from dit_sparse import doctor, models
from dit_sparse.cli import DEFAULT_PROMPT, app
from dit_sparse.commands.limits import check_text
from dit_sparse.models.manifest import NAME, damage, write_manifest
from tests.toy_model import TEXT_LENGTH, save_toy_model

ROOT = Path(__file__).parents[1]
MODEL_BYTES = 40_000_000
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SMALL = ("--height", "32", "--width", "32", "--prompt", "a cow", "--warmup", "0", "-q")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_model(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture
def embedded(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `tiny-video`, here a copy of the toy; the test runs beside it."""
    monkeypatch.setattr(models, "FOLDER", tmp_path)
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(toy, tmp_path / "tiny-video"))


def sample(*arguments: str) -> Any:
    words = ["sample", "--model", "tiny-video", "--device", "cpu", *SMALL, "--format", "json"]
    result = CliRunner().invoke(app, [*words, *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments: str) -> str:
    result = sample(*arguments)
    assert result.exit_code == 2, result.stderr
    assert not list(Path().glob("sample*")), "nothing may be written"
    (sentence,) = (line for line in result.stderr.splitlines() if line.startswith("dit-sparse: "))
    return sentence


def test_names() -> None:
    assert models.names() == ["tiny-video", "tiny-image"]
    assert models.DEFAULT in models.names()
    assert dit_sparse.models is models
    for ask in (models.get, models.path):
        with pytest.raises(ValueError, match=r"got 'tiny-vido'\. Did you mean 'tiny-video'\?"):
            ask("tiny-vido")


def test_finding_a_model_imports_nothing_heavy() -> None:
    code = (
        "import sys, dit_sparse\n"
        "dit_sparse.models.get('tiny-video').damage()\n"
        "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_cpu_gets_less_of_the_same_model() -> None:
    for name in models.names():
        model = models.get(name)
        full, less = model.arguments("cuda"), model.arguments("cpu")
        assert full == model.call
        assert full.keys() == less.keys()
        lower = {key for key in full if less[key] < full[key]}
        assert lower == set(model.without_gpu)


def test_the_default_video_has_the_tokens_that_it_was_made_for(embedded: Path) -> None:
    """The toy has the embedded model's compression: 2 frames and 4 pixels a latent, patch 2."""
    pipe = dit_sparse.load("tiny-video")
    call = models.get("tiny-video").arguments("cuda")
    latents = (call["num_frames"] - 1) // pipe.vae_scale_factor_temporal + 1
    side = call["height"] // (pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[1])
    assert (latents, side) == (25, 16)


def test_an_embedded_model_is_loaded_by_name(embedded: Path) -> None:
    assert models.path("tiny-video") == embedded
    named = dit_sparse.load("tiny-video", dtype=torch.bfloat16)
    by_path = dit_sparse.load(embedded, dtype=torch.bfloat16)
    parameters = zip(named.transformer.parameters(), by_path.transformer.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in parameters)
    whole = dit_sparse.load("tiny-video")  # diffusers alone would leave the text encoder in bf16
    assert {whole.text_encoder.dtype, whole.transformer.dtype} == {torch.float32}
    with pytest.raises(ValueError, match="'tiny-image' is not whole"):
        dit_sparse.load("tiny-image")


def test_a_folder_of_the_same_name_needs_a_path(embedded: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(models, "FOLDER", embedded / "nowhere")
    with pytest.raises(ValueError, match="is not whole"):
        dit_sparse.load("tiny-video")
    assert dit_sparse.load("./tiny-video").transformer is not None


class TestManifest:
    def test_lists_every_file_but_itself(self, embedded: Path) -> None:
        content = json.loads((embedded / NAME).read_text())
        files = {p.relative_to(embedded).as_posix() for p in embedded.rglob("*") if p.is_file()}
        assert set(content["files"]) == files - {NAME}
        assert content["files"][WEIGHTS]["bytes"] == (embedded / WEIGHTS).stat().st_size
        before = (embedded / NAME).read_bytes()
        assert write_manifest(embedded).read_bytes() == before
        assert damage(embedded, digests=True) is None

    def test_only_digests_find_changed_bytes(self, embedded: Path) -> None:
        weights = bytearray((embedded / WEIGHTS).read_bytes())
        weights[-1] ^= 1
        (embedded / WEIGHTS).write_bytes(weights)
        assert models.path("tiny-video") == embedded
        checks = {check.name: check for check in doctor.examine("cpu").models}
        assert not checks["tiny-video"].ok
        assert "Expected SHA-256" in checks["tiny-video"].detail
        assert WEIGHTS in checks["tiny-video"].detail

    def test_the_doctor_says_what_is_whole_and_what_is_missing(self, embedded: Path) -> None:
        checks = {check.name: check for check in doctor.examine("cpu").models}
        assert checks["tiny-video"].ok
        assert str(embedded) in checks["tiny-video"].detail
        assert not checks["tiny-image"].ok


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "found no such folder"),
    "no manifest": (lambda f: (f / NAME).unlink(), "found a folder without it"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "found no such file"),
    "cut weights": (cut, "got 1,000"),
    "no manifest's text": (lambda f: (f / NAME).write_text("{"), "it cannot be read"),
    "other manifest": (lambda f: (f / NAME).write_text("[]"), "it cannot be read"),
    "later manifest": (lambda f: (f / NAME).write_text('{"format": 2}'), "format 2 instead of 1"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_model_is_one_sentence(case: str, embedded: Path) -> None:
    size = (embedded / WEIGHTS).stat().st_size
    harm, found = DAMAGE[case]
    harm(embedded)
    with pytest.raises(ValueError, match=r"is not whole\. Install dit-sparse again") as error:
        models.path("tiny-video")
    assert found in str(error.value)
    if "weights" in case:
        assert f"Expected {size:,} bytes in {embedded / WEIGHTS}" in str(error.value)
    assert str(error.value) in refused()


def test_weights_that_are_no_weights_are_one_sentence(embedded: Path) -> None:
    (embedded / WEIGHTS).write_bytes(b"x" * (embedded / WEIGHTS).stat().st_size)
    assert "pipeline in 'tiny-video', but it cannot be loaded" in refused()


class TestSample:
    def test_a_cpu_makes_less_and_says_so(self, embedded: Path, caplog: Any) -> None:
        result = sample()
        assert result.exit_code == 0, result.stderr
        report = json.loads(result.stdout)
        assert report["model"] == "tiny-video"
        assert report["results"][0]["size"] == [25, 32, 32]
        assert report["results"][0]["steps"] == 16
        assert iio.imread("sample.mp4").shape == (25, 32, 32, 3)
        assert [r.getMessage() for r in caplog.records if r.name == "dit_sparse"] == [
            "On the CPU: 25 frames and 16 steps instead of 49 and 30; "
            "--frames and --steps change that."
        ]

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("--frames", "9"), "On the CPU: 16 steps instead of 30; --steps changes that."),
            (("--frames", "9", "--steps", "1"), ""),
        ],
    )
    def test_what_is_given_is_not_announced(
        self, arguments: tuple[str, ...], said: str, embedded: Path, caplog: Any
    ) -> None:
        assert json.loads(sample(*arguments).stdout)["results"][0]["size"][0] == 9
        assert " ".join(r.getMessage() for r in caplog.records if r.name == "dit_sparse") == said

    def test_compare(self, embedded: Path) -> None:
        arguments = ("--frames", "9", "--steps", "2", "--compare", "--density", "1.0")
        (result,) = json.loads(sample(*arguments).stdout)["results"]
        assert result["attention"]["dense"] == 0
        assert result["dense"]["psnr_db"] is None or result["dense"]["psnr_db"] > 60

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (("--height", "24"), "multiple of 16 for WanPipeline, got 24. Use 16 or 32."),
            (("--width", "3"), "multiple of 16 for WanPipeline, got 3. Use 16."),
            (("--frames", "10"), "multiple of 2 plus 1 for WanPipeline, got 10. Use 9 or 11."),
            (("--negative-prompt", "x" * 64), "--negative-prompt of at most 63 tokens"),
        ],
    )
    def test_what_the_stock_pipeline_would_change_is_refused(
        self, arguments: tuple[str, ...], sentence: str, embedded: Path
    ) -> None:
        assert sentence in refused(*arguments)

    def test_a_prompt_that_would_be_cut_is_refused(self, embedded: Path) -> None:
        longest = TEXT_LENGTH - 1  # and the end
        sentence = refused("--prompt", "a cow", "--prompt", "x" * (longest + 7))
        assert f"--prompt of at most {longest} tokens for WanPipeline, got 70. Shorten" in sentence
        check_text(dit_sparse.load("tiny-video"), "x" * longest, "--prompt")

    def test_one_tokenizer_that_reads_everything_is_enough(self, embedded: Path) -> None:
        class Two:
            components: ClassVar = dict(dit_sparse.load("tiny-video").components)

            def __call__(self, prompt: str, max_sequence_length: int = 12) -> None: ...

        wide = dit_sparse.load("tiny-video").tokenizer
        wide.model_max_length = 99
        with pytest.raises(ValueError, match="at most 11 tokens"):
            check_text(Two(), "x" * 12, "--prompt")
        Two.__call__.__defaults__ = (None,)
        with pytest.raises(ValueError, match="at most 63 tokens"):
            check_text(Two(), "x" * 64, "--prompt")
        Two.components["tokenizer_2"] = wide
        check_text(Two(), "x" * 64, "--prompt")
        with pytest.raises(ValueError, match="at most 98 tokens"):
            check_text(Two(), "x" * 99, "--prompt")


@pytest.fixture(params=models.names())
def real(request: pytest.FixtureRequest) -> models.EmbeddedModel:
    """An embedded model as it is in the tree."""
    return models.get(request.param)


class TestShipped:
    def test_is_whole_light_and_described(self, real: models.EmbeddedModel) -> None:
        assert real.damage(digests=True) is None
        files = [path for path in real.folder.rglob("*") if path.is_file()]
        listed = json.loads((real.folder / NAME).read_text())["files"]
        assert {p.relative_to(real.folder).as_posix() for p in files} == {*listed, NAME}
        assert sum(path.stat().st_size for path in files) <= MODEL_BYTES
        card = (real.folder / "README.md").read_text(encoding="utf-8")
        assert card.startswith("---")
        assert "license:" in card

    def test_weights_are_bf16(self, real: models.EmbeddedModel) -> None:
        shards = sorted(real.folder.rglob("*.safetensors"))
        assert shards
        for shard in shards:
            with safe_open(shard, "pt") as weights:
                kinds = {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
            assert kinds == {"BF16"}, shard

    def test_the_default_call_makes_a_picture(self, real: models.EmbeddedModel) -> None:
        pipe = dit_sparse.load(real.name)
        pipe.set_attn_processor("window")
        pipe.set_progress_bar_config(disable=True)
        call = real.arguments("cpu") | {"num_inference_steps": 1}
        check_text(pipe, DEFAULT_PROMPT, "--prompt")
        generator = torch.Generator().manual_seed(0)
        output = pipe(DEFAULT_PROMPT, **call, generator=generator, output_type="np")
        frames = output.frames[0] if "num_frames" in call else output.images
        assert frames.shape == (call.get("num_frames", 1), call["height"], call["width"], 3)
        assert np.isfinite(frames).all()
        assert frames.std() > 0
        assert dit_sparse.summary(pipe).sparse > 0
