"""The command line: every command, what it writes, and that bad input is one sentence."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from imageio import v3 as iio
from typer.testing import CliRunner

from dit_sparse import methods
from dit_sparse.cli import app
from dit_sparse.commands import sample as sampling
from dit_sparse.commands.methods import Wording
from dit_sparse.commands.report import describe
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.method import CallContext
from dit_sparse.methods.schedule import Schedule
from dit_sparse.methods.window import WindowMethod
from dit_sparse.plan import BlockPlan
from dit_sparse.plan_io import save_plan

SMALL = ["sample", "--model", "tiny:wan", "--device", "cpu", "--steps", "2", "--frames", "9"]
SMALL += ["--height", "64", "--width", "96", "--warmup", "0", "--option", "block=64"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Any:
    """The result of a command that must not raise."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def sample(*arguments: str) -> dict[str, Any]:
    """The JSON of a small sample; nothing else may be on stdout."""
    result = run(*SMALL, "--format", "json", *arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(*arguments: str) -> str:
    """The one sentence of a command that must be refused."""
    result = run(*arguments)
    assert result.exit_code == 2, result.stdout + result.stderr
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if "it/s]" not in line]
    sentences = [line for line in lines if line.startswith("dit-sparse: ")]
    assert len(sentences) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert not list(Path().glob("sample*")), "nothing may be written"
    return sentences[0]


class TestSample:
    def test_default_makes_a_video_that_decodes(self) -> None:
        report = sample("--output", "clip.mp4", "--fps", "8")
        assert iio.imread("clip.mp4").shape == (9, 64, 96, 3)
        assert iio.immeta("clip.mp4")["fps"] == 8
        (result,) = report["results"]
        assert result["output"] == "clip.mp4"
        assert result["size"] == [9, 64, 96]
        assert report["model"] == "tiny:wan"
        assert result["dense"] is None

    def test_a_precision_runs(self) -> None:
        (result,) = sample("--density", "0.2", "--precision", "int8")["results"]
        assert result["attention"]["backends"] == ["reference int8"]

    def test_counts_and_times_are_those_of_the_run(self) -> None:
        (result,) = sample("--density", "0.2")["results"]
        attention = result["attention"]
        # 2 layers, 2 steps, and guidance doubles the forwards.
        assert (attention["sparse"], attention["dense"]) == (8, 0)
        assert attention["backends"] == ["reference"]
        assert 0 < attention["density"] < 1
        assert result["overall_density"] == pytest.approx(attention["density"])
        assert len(result["step_seconds"]) == result["steps"] == 2
        assert sum(result["step_seconds"]) == pytest.approx(result["denoising_seconds"])
        assert 0 < result["denoising_seconds"] < result["total_seconds"]

    def test_schedule_keeps_calls_dense_and_says_why(self) -> None:
        (result,) = sample("--dense-first", "0.5", "--dense-layers", "-1")["results"]
        attention = result["attention"]
        assert (attention["sparse"], attention["dense"]) == (2, 6)
        assert attention["reasons"] == {"dense_layers": 4, "dense_first=0.5": 2}
        assert result["overall_density"] == pytest.approx((2 * attention["density"] + 6) / 8)

    def test_a_named_method_has_the_familys_defaults(self) -> None:
        words = ["--method", "pisa", "--density", "0.5"]
        report = sample(*words)
        (result,) = report["results"]
        # Wan: a fifth of the steps, which is one of two, and layer 0.
        assert result["attention"]["reasons"] == {"dense_first=0.2": 2, "dense_layers": 4}
        assert "density=0.5, block=64), dense_first=0.2, dense_layers=(0,)" in report["method"]
        (result,) = sample(*words, "--dense-first", "0", "--dense-layers", "none")["results"]
        assert (result["attention"]["sparse"], result["attention"]["dense"]) == (8, 0)
        bare = [word for word in SMALL if word not in ("--option", "block=64")]
        report = json.loads(run(*bare, "--method", "pisa", "--format", "json").stdout)
        assert report["method"].startswith("schedule(pisa(density=0.125, least=1), dense_first")

    def test_min_tokens_makes_everything_dense(self) -> None:
        (result,) = sample("--min-tokens", "1000")["results"]
        assert result["attention"]["sparse"] == 0
        assert result["overall_density"] == 1.0

    def test_warmup_counts_nowhere(self) -> None:
        report = sample("--warmup", "1", "--dense-last", "1")
        assert report["warmup_seconds"] > 0
        assert report["results"][0]["attention"]["sparse"] == 4

    def test_compare_at_full_density_reproduces_dense(self) -> None:
        (result,) = sample("--density", "1.0", "--compare", "--output", "a.gif")["results"]
        assert result["dense"]["psnr_db"] is None or result["dense"]["psnr_db"] > 80
        assert result["dense"]["speedup"] == pytest.approx(
            result["dense"]["denoising_seconds"] / result["denoising_seconds"]
        )
        assert result["dense"]["output"] == "a-dense.gif"
        assert len(iio.imread("a-dense.gif")) == 9

    def test_compare_of_dense_with_itself_is_identical(self) -> None:
        report = run(*SMALL[:-2], "--method", "dense", "--compare", "--format", "json")
        assert json.loads(report.stdout)["results"][0]["dense"]["identical"] is True

    def test_compare_sees_what_sparsity_changes(self) -> None:
        (result,) = sample("--option", "window=1x1x1", "--compare")["results"]
        assert 0 < result["dense"]["psnr_db"] < 80

    def test_prompts_are_numbered_and_differ(self) -> None:
        Path("prompts.txt").write_text("a cat\n\n  a dog on the moon \n")
        report = sample("--prompt-file", "prompts.txt", "--output", "x.png")
        assert [r["prompt"] for r in report["results"]] == ["a cat", "a dog on the moon"]
        assert [r["output"] for r in report["results"]] == ["x-1.png", "x-2.png"]
        assert not np.array_equal(iio.imread("x-1.png"), iio.imread("x-2.png"))

    def test_seed_and_negative_prompt_decide_the_result(self) -> None:
        pictures = {}
        for name, words in {
            "same": [],
            "again": [],
            "seed": ["--seed", "1"],
            "negative": ["--negative-prompt", "blurry"],
            "guidance": ["--guidance", "9"],
        }.items():
            sample("--output", f"{name}.png", *words)
            pictures[name] = iio.imread(f"{name}.png")
        np.testing.assert_array_equal(pictures["same"], pictures["again"])
        for name in ("seed", "negative", "guidance"):
            assert not np.array_equal(pictures["same"], pictures[name]), name

    def test_image_models_write_png_by_default(self) -> None:
        result = run("sample", "--model", "tiny:sd3", "--steps", "1", "--device", "cpu", "-q")
        assert result.exit_code == 0, result.stderr
        assert iio.imread("sample.png").ndim == 3

    def test_class_conditional_models_take_a_number(self) -> None:
        words = ["sample", "--model", "tiny:dit", "--steps", "1", "--device", "cpu"]
        assert run(*words, "--prompt", "7").exit_code == 0
        Path("sample.png").unlink()
        assert "class number" in refused(*words, "--prompt", "seven")

    def test_a_saved_pipeline_is_loaded(self) -> None:
        from dit_sparse.pipelines.tiny import tiny_pipeline

        tiny_pipeline("dit").save_pretrained("saved")
        result = run(
            *["sample", "--model", "saved", "--prompt", "7", "--steps", "1", "--device", "cpu"],
            *["--format", "json", "--output", "saved.png"],
        )
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["pipeline"] == "DiTPipeline"
        assert Path("saved.png").exists()

    def test_bfloat16(self) -> None:
        assert sample("--dtype", "bf16")["dtype"] == "bfloat16"

    def test_text_report_names_what_ran_and_progress_is_on_stderr(self) -> None:
        result = run(*SMALL, "--dense-first", "1", "--density", "0.2", "--compare")
        assert "schedule(window(density=0.2, block=64), dense_first=1)" in result.stdout
        assert "s per step (2 steps" in result.stdout
        assert "sparse     4 of 8 calls" in result.stdout
        assert "4 calls: dense_first=1" in result.stdout
        assert "speedup" in result.stdout
        assert "PSNR" in result.stdout
        assert "0/2" in result.stderr
        assert "0/2" not in result.stdout

    def test_quiet_has_no_progress_bar(self) -> None:
        assert "0/2" not in run(*SMALL, "--quiet").stderr

    def test_compile_compiles_the_repeated_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from diffusers import WanTransformer3DModel

        calls = []
        monkeypatch.setattr(
            WanTransformer3DModel, "compile_repeated_blocks", lambda self, **kw: calls.append(kw)
        )
        assert sample("--compile")["compiled"] is True
        assert calls == [{"fullgraph": True, "backend": "inductor"}]

    def test_nan_frames_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from diffusers.video_processor import VideoProcessor

        monkeypatch.setattr(
            VideoProcessor, "postprocess_video", lambda *_, **__: np.full((1, 9, 64, 96, 3), np.nan)
        )
        assert "finite frames, got NaN" in refused(*SMALL)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("offload", ["none", "model", "sequential", "group"])
def test_sample_on_a_gpu(offload: str) -> None:
    options = ["--steps", "2", "--format", "json", "--offload", offload, "--output", "sample.gif"]
    result = run("sample", "--model", "tiny:wan", *options)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["dtype"] == "bfloat16"
    assert report["results"][0]["attention"]["backends"] == ["triton"]
    assert report["results"][0]["attention"]["sparse"] == 8
    assert iio.imread("sample.gif").shape == (33, 256, 384, 3)


BAD = {
    "method": (["--method", "windwo"], "Did you mean 'window'?"),
    "option": (["--option", "densty=0.3"], "Did you mean 'density'?"),
    "option text": (["--option", "density"], "--option key=value, got 'density'"),
    "option type": (["--option", "density=high"], "none or a number for option density"),
    "option tuple": (["--option", "window=3x"], "numbers such as 3x5x5"),
    "option twice": (["--option", "density=0.5", "--option", "density=0.6"], "once"),
    "density nan": (["--density", "nan"], "density above 0 and at most 1, got nan"),
    "density 0": (["--density", "0"], "density above 0"),
    "density 1.5": (["--density", "1.5"], "at most 1, got 1.5"),
    "density option nan": (["--option", "density=nan"], "density above 0"),
    "density twice": (["--density", "0.5", "--option", "density=0.5"], "one density"),
    "density of dense": (["--method", "dense", "--density", "0.5"], "method with a density"),
    "window above grid": (["--option", "window=99x1x1"], "window along frames between 1 and"),
    "window of 2-D": (["--option", "window=3x3"], "without one along frames"),
    "window of nothing": (["--option", "window=0"], "at least 1 along frames, height and width"),
    "windows per head": (["--option", "window=1x3x3,1x3x0"], "along width of at least 1 token"),
    "dense first": (["--dense-first", "few"], "--dense-first to be a count of steps"),
    "dense first negative": (["--dense-first", "-1"], "dense_first"),
    "dense first nan": (["--dense-first", "nan"], "dense_first"),
    "dense last above 1": (["--dense-last", "1.5"], "dense_last"),
    "dense layers": (["--dense-layers", "a-b"], "layer numbers such as"),
    "dense layer 9": (["--dense-layers", "9"], "layer numbers from -2 to 1, got 9"),
    "min tokens": (["--min-tokens", "-1"], "min_tokens"),
    "family": (["--model", "tiny:wam"], "Did you mean 'wan'?"),
    "model word": (["--model", "wan"], "an existing folder, a model id such as owner/name"),
    "model typo": (["--model", "tiny-vido"], "Did you mean 'tiny-video'?"),
    "missing folder": (["--model", "./nothing/here"], "an existing folder"),
    "dtype": (["--dtype", "bflaot16"], "Did you mean 'bfloat16'?"),
    "fp8": (["--dtype", "fp8"], "what attention computes in, got 'fp8'"),
    "half on CPU": (["--dtype", "float16"], "got float16, which needs a GPU"),
    "device": (["--device", "cdua"], "Did you mean 'cuda'?"),
    "device number": (["--device", "cpu:3"], "device number below 1"),
    "offload": (["--offload", "modle"], "Did you mean 'model'?"),
    "offload on CPU": (["--offload", "model"], "a GPU to offload from"),
    "backend": (["--backend", "refrence"], "Did you mean 'reference'?"),
    "precision": (["--precision", "fp9"], "Did you mean 'fp8'?"),
    "backend of a precision": (["--backend", "flex", "--precision", "fp8"], "reference in fp8"),
    "backend refuses": (["--backend", "flex"], "flex"),
    "height": (["--height", "65"], "--height to be a multiple of 16 for WanPipeline, got 65"),
    "width": (["--width", "8"], "Use 16."),
    "height 0": (["--height", "0"], "--height of at least 1"),
    "height of both": (["--height", "65"], "Use 64 or 80."),
    "frames": (["--frames", "10"], "--frames to be a multiple of 4 plus 1"),
    "frames of both": (["--frames", "10"], "Use 9 or 13."),
    "steps": (["--steps", "0"], "--steps of at least 1"),
    "seed": (["--seed", "-1"], "--seed from 0"),
    "guidance": (["--guidance", "nan"], "finite --guidance"),
    "warmup": (["--warmup", "-1"], "--warmup of at least 0"),
    "prompt": (["--prompt", "  "], "a prompt with at least one word"),
    "prompt file missing": (["--prompt-file", "none.txt"], "No such file"),
    "prompt file empty": (["--prompt-file", "empty.txt"], "got an empty file"),
    "prompt file binary": (["--prompt-file", "binary.txt"], "UTF-8"),
    "prompt twice": (["--prompt", "x", "--prompt-file", "empty.txt"], "got both"),
    "suffix": (["--output", "x.avi"], "ends in .mp4, .gif, .png"),
    "output folder": (["--output", "nowhere/x.mp4"], "existing folder"),
    "output is a folder": (["--output", "folder.mp4"], "got the folder"),
    "fps": (["--fps", "0"], "positive --fps"),
    "format": (["--format", "xml"], "--format among text, json"),
    "image as mp4": (["--model", "tiny:sd3", "--output", "x.mp4"], "Expected a .png"),
    "frames of an image": (["--model", "tiny:sd3", "--frames", "9"], "got --frames"),
    "no negative": (["--model", "tiny:flux", "--negative-prompt", "x"], "takes --negative-prompt"),
    "corrupt index": (["--model", "corrupt"], "'corrupt', but it cannot be loaded"),
    "no index": (["--model", "folder.mp4"], "model_index.json"),
    "cut weights": (["--model", "cut", "--prompt", "1"], "'cut', but it cannot be loaded"),
    "plan and density": (["--plan", "other.plan", "--density", "0.5"], "got both"),
    "no plan": (["--plan", "none.plan"], "Expected to read a plan, got 'No such file"),
    "corrupt plan": (["--plan", "binary.txt"], "Expected a plan in binary.txt"),
    "plan for another grid": (["--plan", "other.plan"], "got 72 and 72: the plan is for another"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(case: str) -> None:
    arguments, sentence = BAD[case]
    Path("empty.txt").write_text("\n \n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    Path("folder.mp4").mkdir()
    Path("corrupt").mkdir()
    Path("corrupt/model_index.json").write_text("{not json")
    if case == "cut weights":
        _save_with_cut_weights("cut")
    save_plan(plan_of(TokenGrid(2, 5, 7)), "other.plan")
    sized = [] if "--model" in arguments else SMALL[1 : -2 if "--plan" in arguments else None]
    words = ["--device", "cpu", *sized, "--output", "sample.png", *arguments]
    assert sentence in refused("sample", *words)


def plan_of(grid: TokenGrid) -> BlockPlan:
    method = WindowMethod(density=0.5)
    return method.plan(torch.zeros(1), torch.zeros(1), CallContext(TokenLayout.of(grid)))


def test_sample_runs_a_saved_plan() -> None:
    plan = plan_of(TokenGrid(3, 4, 6))
    save_plan(plan, "small.plan")
    result = run(*SMALL[:-2], "--format", "json", "--plan", "small.plan", "--output", "sample.png")
    assert result.exit_code == 0, result.stderr
    attention = json.loads(result.stdout)["results"][0]["attention"]
    assert attention["density"] == pytest.approx(plan.density)
    assert attention["sparse"] == 8


def _save_with_cut_weights(folder: str) -> None:
    from dit_sparse.pipelines.tiny import tiny_pipeline

    tiny_pipeline("dit").save_pretrained(folder)
    for weights in Path(folder).rglob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:100])


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "PyTorch finds no GPU here" in refused("sample", "--device", "cuda")
    assert "PyTorch finds no GPU here" in refused("doctor", "--device", "cuda:0")


@pytest.mark.parametrize("arguments", [["--output", "/proc/self/x.mp4"], ["--output", "x.avi"]])
def test_output_is_checked_before_the_model_is_opened(
    monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str]
) -> None:
    monkeypatch.setattr(sampling, "open_model", lambda *_, **__: pytest.fail("model opened"))
    refused("sample", *arguments)


def test_pipelines_that_need_more_than_a_prompt_are_refused() -> None:
    from diffusers import WanImageToVideoPipeline

    from dit_sparse.commands.models import Model
    from dit_sparse.pipelines.tiny import tiny_pipeline

    wan = tiny_pipeline("wan").components
    pipe = WanImageToVideoPipeline(**wan, image_processor=None, image_encoder=None)
    model = Model("x", pipe, lambda prompt, negative: {"prompt": prompt})
    with pytest.raises(ValueError, match="WanImageToVideoPipeline, which also needs image"):
        model.arguments("a cat", None, {})


def test_verbose_shows_where_input_was_refused(caplog: pytest.LogCaptureFixture) -> None:
    result = run("--verbose", "sample", "--steps", "0")
    assert result.exit_code == 2
    assert any(record.exc_info for record in caplog.records)


def test_methods_lists_every_option() -> None:
    listed = {row["name"]: row for row in json.loads(run("methods", "--format", "json").stdout)}
    assert set(listed) == set(methods.names())
    for name, row in listed.items():
        assert [o["name"] for o in row["options"]] == [o.name for o in methods.describe(name)]
        assert all(option["help"] for option in row["options"])
    assert "density=None" in run("methods").stdout


def test_methods_lists_those_that_are_named() -> None:
    rows = json.loads(run("methods", "psa", "pisa", "--format", "json").stdout)
    assert [row["name"] for row in rows] == ["psa", "pisa"]
    refused = run("methods", "pissa")
    assert refused.exit_code == 2
    assert "got 'pissa'. Did you mean 'pisa'?" in refused.stderr


def test_families_lists_every_family() -> None:
    from dit_sparse.pipelines.family import families

    listed = {row["name"]: row for row in json.loads(run("families", "--format", "json").stdout)}
    assert set(listed) == set(families())
    assert "WanTransformer3DModel" in listed["wan"]["transformers"]
    assert listed["wan"]["model"] in run("families").stdout


def test_method_words_become_a_method() -> None:
    words = ("window=3x0.5x7", "stride=2", "block=64")
    assert Wording("window", words).method() == WindowMethod((3, 0.5, 7), stride=2, block=64)
    assert Wording("window", ("stride=2,2,1",)).method() == WindowMethod(stride=(2, 2, 1))
    assert Wording("window", ("density=none",)).method() == WindowMethod()
    for heads in ("1x3x5,2x0.5x7", "1x3x5+2x0.5x7"):
        expected = WindowMethod(((1, 3, 5), (2, 0.5, 7)))
        assert Wording("window", (f"window={heads}",)).method() == expected
    assert Wording("sta", ("window=3x1x1,3x3x3",)).method().window == ((3, 1, 1), (3, 3, 3))
    schedule = {"dense_first": "0.25", "dense_last": "3", "dense_layers": "0,4-6,-1"}
    scheduled = Wording("dense", schedule=schedule).method()
    assert isinstance(scheduled, Schedule)
    assert (scheduled.dense_first, scheduled.dense_last) == (0.25, 3)
    assert scheduled.dense_layers == (0, 4, 5, 6, -1)


def test_describe_shows_what_differs_from_the_defaults() -> None:
    assert describe(WindowMethod()) == "window()"
    inner = WindowMethod(density=0.5)
    assert describe(Schedule(inner, min_tokens=9)) == "schedule(window(density=0.5), min_tokens=9)"


def test_psnr() -> None:
    zeros = np.zeros((1, 2, 2, 3), np.float32)
    assert sampling.psnr(zeros, zeros) == math.inf
    assert sampling.psnr(zeros, zeros + 0.1) == pytest.approx(20, abs=1e-4)


def test_importing_and_help_load_nothing_heavy() -> None:
    code = """
import sys, dit_sparse
heavy = lambda: {"torch", "triton", "diffusers", "transformers"} & set(sys.modules)
assert not heavy(), heavy()
from typer.testing import CliRunner
from dit_sparse.cli import app
for words in [["--help"], ["sample", "--help"], ["--version"]]:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and result.stdout, words
assert not heavy(), heavy()
import dit_sparse
dit_sparse.BlockPlan, dit_sparse.attend, dit_sparse.methods
assert not heavy() - {"torch"}, heavy()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_every_exported_name_is_there() -> None:
    import dit_sparse

    assert set(dit_sparse.__all__) <= set(dir(dit_sparse))
    for name, home in dit_sparse._HOMES.items():
        value = getattr(dit_sparse, name)
        assert (value.__name__, value.__module__) == (name, home)
    assert dit_sparse.methods is methods
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = dit_sparse.nonsense


def test_runs_as_a_module_from_a_bare_checkout() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "dit_sparse", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    import dit_sparse

    assert result.stdout.strip() == dit_sparse.__version__
