"""Whole runs of the training script with a toy recipe."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from diffusers import WanPipeline

from dit_sparse.models.manifest import damage
from scripts.train import parser, request_of
from scripts.training.checkpoint import open_checkpoint
from scripts.training.export import export
from scripts.training.parts import train_part
from scripts.training.pipeline import load_pipeline

ROOT = Path(__file__).parents[2]
SMALL = ("--recipe", "toy", "--data", "shapes", "--warmup", "0", "--cooldown", "0")
BOX = ("--minutes", "1e6", "--log-every", "2", "--uses", "1")


def run(*arguments: object) -> None:
    """What the script does with these arguments, in this process."""
    train_part(request_of(parser().parse_args([str(argument) for argument in arguments])))


def stills(out: Path, steps: int, *more: object) -> None:
    sizes = ("--sizes", "1x32x32:2,5x16x16:2", "--shown", "1x16x16", "--steps", steps)
    run("stills", *SMALL, *BOX, *sizes, "--out", out, *more)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red circle\n")
    return path


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A checkpoint with a VAE of three steps."""
    out = tmp_path_factory.mktemp("vae")
    sizes = ("--sizes", "5x16x16:2", "--shown", "5x16x16", "--steps", 3)
    run("vae", *SMALL, *BOX, *sizes, "--out", out)
    return out


@pytest.fixture(scope="module")
def straight(vae, prompts, tmp_path_factory):
    """Six steps of the denoiser in one run."""
    out = tmp_path_factory.mktemp("straight")
    stills(out, 6, "--resume", vae, "--prompts", prompts)
    return out


def denoiser_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(folder, "toy").read(folder, "denoiser").tensors)


def test_a_run_leaves_a_whole_folder(straight):
    names = {path.name.split("-")[0] for path in straight.iterdir()}
    assert names == {
        "checkpoint.json",
        "history.jsonl",
        "loss.png",
        "samples.png",
        "vae",
        "denoiser",
    }
    checkpoint = open_checkpoint(straight, "toy")
    assert checkpoint.steps == {"vae": 3, "denoiser": 6}
    assert [record["steps"] for record in checkpoint.runs] == [3, 6]
    assert checkpoint.runs[0]["held_out_psnr_db"] > 0
    lines = [json.loads(line) for line in (straight / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["part"] == "denoiser"] == [2, 4, 6]


def test_an_exact_resume_repeats_the_straight_run(vae, straight, prompts, tmp_path, caplog):
    out, state = tmp_path / "out", tmp_path / "state"
    stills(out, 3, "--resume", vae, "--prompts", prompts, "--state", state)
    with caplog.at_level("INFO", "train"):
        stills(out, 3, "--prompts", prompts, "--state", state)
    assert "exact state of step 3" in caplog.text
    expected, found = denoiser_of(straight), denoiser_of(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_resume_from_shards_starts_at_the_average(straight, prompts, tmp_path):
    """What is lost is the optimizer and the low bits, so one step moves weights only a little."""
    stills(tmp_path, 1, "--resume", straight, "--prompts", prompts, "--lr", 1e-4)
    assert open_checkpoint(tmp_path, "toy").steps["denoiser"] == 7
    before, after = denoiser_of(straight), denoiser_of(tmp_path)
    moved = max(float((before[n].float() - after[n].float()).abs().max()) for n in before)
    assert 0 < moved < 0.02  # the largest weights are near 4, whose bf16 steps are 1/64


def test_an_export_is_a_stock_pipeline(straight, tmp_path):
    target = tmp_path / "pipe"
    assert "loads and samples" in export(straight, target, "toy")
    assert damage(target, digests=True) is None
    card = (target / "README.md").read_text()
    assert "MIT" in card
    assert "| stills |" in card
    pipe = WanPipeline.from_pretrained(target, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    ours = load_pipeline(open_checkpoint(straight, "toy"), straight)
    ours.set_progress_bar_config(disable=True)
    clips = [
        p(
            "a red circle",
            height=32,
            width=32,
            num_frames=9,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
        ).frames
        for p in (pipe, ours)
    ]
    assert clips[0].shape == (1, 9, 32, 32, 3)
    assert abs(clips[0] - clips[1]).max() < 1e-3


def test_a_truncated_shard_is_a_sentence(straight, prompts, tmp_path):
    for path in straight.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = next(tmp_path.glob("denoiser-*.bin"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"^Expected \d+ bytes in .* truncated"):
        stills(tmp_path, 1, "--prompts", prompts)


def test_stages_out_of_order_are_a_sentence(straight, prompts, tmp_path):
    with pytest.raises(ValueError, match="no vae run"):
        stills(tmp_path / "new", 1, "--prompts", prompts)
    with pytest.raises(ValueError, match="start in a new folder"):
        run("vae", *SMALL, *BOX, "--out", straight, "--steps", 1)
    with pytest.raises(ValueError, match="Train the denoiser first"):
        export(vae_only(straight, tmp_path), tmp_path / "pipe", "toy")


def test_a_denoiser_is_restarted_in_a_new_folder_alone(straight, prompts, tmp_path):
    out, flag = tmp_path / "out", "--restart-denoiser"
    for folder in ((), ("--resume", straight)):
        with pytest.raises(ValueError, match=r"^Expected --restart-denoiser with a --resume"):
            stills(straight, 1, "--prompts", prompts, flag, *folder)
    assert open_checkpoint(straight, "toy").steps == {"vae": 3, "denoiser": 6}
    sizes = ("--sizes", "5x16x16:2", "--shown", "5x16x16", "--steps", 2)
    with pytest.raises(ValueError, match=flag):
        run("vae", *SMALL, *BOX, *sizes, "--out", tmp_path / "no", "--resume", straight)
    run("vae", *SMALL, *BOX, *sizes, "--out", out, "--resume", straight, flag)
    found = open_checkpoint(out, "toy")
    assert found.steps == {"vae": 5}
    assert set(found.parts) == {"vae"}
    assert [record["stage"] for record in found.runs] == ["vae", "vae"]
    assert not list(out.glob("denoiser-*"))
    assert "denoiser" not in (out / "history.jsonl").read_text()
    with pytest.raises(ValueError, match="Go without"):
        stills(tmp_path / "other", 1, "--resume", out, "--prompts", prompts, flag)


def test_a_restarted_denoiser_forgets_the_old_one(straight, vae, prompts, tmp_path):
    stills(tmp_path, 6, "--resume", straight, "--prompts", prompts, "--restart-denoiser")
    assert open_checkpoint(tmp_path, "toy").steps == {"vae": 3, "denoiser": 6}
    expected, found = denoiser_of(straight), denoiser_of(tmp_path)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def vae_only(straight: Path, target: Path) -> Path:
    content = json.loads((straight / "checkpoint.json").read_text())
    del content["parts"]["denoiser"]
    folder = target / "vae"
    folder.mkdir()
    (folder / "checkpoint.json").write_text(json.dumps(content))
    for path in straight.glob("vae-*.bin"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_the_script_says_in_a_sentence_what_is_missing(tmp_path):
    command = ("stills", "--data", tmp_path / "no", "--minutes", 1, "--out", tmp_path / "o")
    done = subprocess.run(
        [sys.executable, "scripts/train.py", *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Expected 'shapes' or a folder of built training data")
