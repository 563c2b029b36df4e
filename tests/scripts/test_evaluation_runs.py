"""Whole runs of the evaluation script on tiny random pipelines with text encoders."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import dit_sparse
from dit_sparse.evaluation.prompts import CLIPS
from dit_sparse.grid import TokenGrid
from dit_sparse.pipelines.tiny import tiny_pipeline
from scripts import evaluate_models
from scripts.evaluation import compare
from scripts.evaluation.maps import map_heads
from scripts.evaluation.model import Model, model_of, open_pipeline
from scripts.evaluation.probe import capture, layers_of

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CLIP, PICTURE = "9x32x48", "1x16x24"  # 3x2x3 and 8x12 tokens


def tokenizer(length: int) -> transformers.PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "</s>": 1, "a": 2, "cow": 3, "red": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="a",
        model_max_length=length,
    )


def t5(cls: str) -> torch.nn.Module:
    config = getattr(transformers, f"{cls.removesuffix('EncoderModel')}Config")(
        vocab_size=8, d_model=32, d_kv=16, d_ff=32, num_heads=2, num_layers=1
    )
    return getattr(transformers, cls)(config).eval()


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    pipe = tiny_pipeline("wan")
    pipe.register_modules(tokenizer=tokenizer(512), text_encoder=t5("UMT5EncoderModel"))
    folder = tmp_path_factory.mktemp("models") / "tiny-clips"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    clip = transformers.CLIPTextConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=32,
        eos_token_id=1,
    )
    pipe = tiny_pipeline("flux")
    pipe.register_modules(
        tokenizer=tokenizer(16),
        text_encoder=transformers.CLIPTextModel(clip).eval(),
        tokenizer_2=tokenizer(512),
        text_encoder_2=t5("T5EncoderModel"),
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-pictures"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def fast(monkeypatch):
    """Features of 4 x 4 colours instead of the network's 1280."""

    def colours(pictures: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(pictures, 4).flatten(1)

    monkeypatch.setattr(evaluate_models, "load_extractor", lambda device: colours)


def run(command: str, model: Path, size: str, *more: object) -> None:
    """What the script does with these arguments, in this process."""
    common = ("--model", model, "--size", size, "--steps", 2, "--batch", 3, "--device", "cpu")
    arguments = [str(a) for a in (command, *common, *more)]
    parsed = evaluate_models.parser().parse_args(arguments)
    evaluate_models.COMMANDS[command](parsed, model_of(parsed))


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sheets_of_clips_show_and_play(wan, tmp_path):
    run("sheets", wan, CLIP, "--data", "shapes", "--to", tmp_path / "docs", "--count", 2)
    names = {path.name for path in (tmp_path / "docs").iterdir()}
    kinds = ("prompts", "compositions", "held_out")
    assert names == {f"{k}{s}.webp" for k in kinds for s in ("", "-moving")}
    with Image.open(tmp_path / "docs" / "prompts.webp") as sheet:
        assert sheet.size == (8 * 48, 16 * (32 + 40))
    with Image.open(tmp_path / "docs" / "prompts-moving.webp") as moving:
        assert moving.n_frames == 9
        assert moving.width * moving.height >= 16 * 48 * 32


def test_sheets_of_pictures(flux, tmp_path):
    run("sheets", flux, PICTURE, "--data", "shapes", "--to", tmp_path, "--count", 2)
    assert {p.name for p in tmp_path.iterdir()} == {
        "prompts.webp",
        "compositions.webp",
        "held_out.webp",
    }


def test_distance(wan, tmp_path, fast):
    output = tmp_path / "new" / "distance.jsonl"
    more = ("--samples", 6, "--per-clip", 2, "--output", output)
    run("distance", wan, CLIP, "--data", "shapes", *more)
    rows = lines_of(output)
    assert [row["split"] for row in rows] == ["compositions"] * 3 + ["held_out"] * 3
    samples, real, coarser = rows[:3]
    assert (samples["compared"], real["compared"]) == ("samples", "real")
    assert samples["value"] > 2 * real["value"] > 0  # noise looks like nothing that is real
    assert coarser["compared"] == "real, 4 times coarser"
    assert coarser["value"] != real["value"]
    for row in rows:
        assert (row["clips"], row["frames"], row["size"]) == (6, 12, CLIP)
        assert row["metric"] == "FD-EfficientNetLite0"
        assert row["environment"]["torch"] == torch.__version__


def test_neighbours(wan, tmp_path, fast):
    more = ("--samples", 5, "--training-clips", 20, "--per-clip", 2, "--shown", 4)
    run("neighbours", wan, CLIP, "--data", "shapes", "--to", tmp_path, *more)
    (record,) = lines_of(tmp_path / "neighbours.jsonl")
    assert (record["clips"], record["training_clips"]) == (5, 20)
    assert sorted(record["samples"]) == record["samples"]
    assert record["nearer_than_5_percent_of_real"] == 0.0
    with Image.open(tmp_path / "neighbours.webp") as picture:
        assert picture.size == (4 * 96, 32 + 40)


@pytest.mark.parametrize(("model", "size", "layers"), [("wan", CLIP, 2), ("flux", PICTURE, 4)])
def test_maps(model, size, layers, tmp_path, request):
    folder = request.getfixturevalue(model)
    run("maps", folder, size, "--to", tmp_path, "--at", "0,1")
    rows = lines_of(tmp_path / "heads.jsonl")
    assert len(rows) == layers * 2 * 2  # heads and steps
    assert {row["step"] for row in rows} == {0, 1}
    assert all(row["entropy"] > 0 for row in rows)
    assert (rows[0]["text"] > 0) == (model == "flux")
    assert {p.name for p in tmp_path.glob("*.webp")} == {"maps.webp", "zooms.webp", "kinds.webp"}
    assert len((tmp_path / "heads.md").read_text().splitlines()) == 2 + layers * 2


def test_the_probe_sees_what_attention_read(wan):
    """The captured q and k are those of the attention call, and the run is the dense one."""
    model = Model(open_pipeline(wan, CPU), "wan", (9, 32, 48), steps=2)
    (before,) = model.sample([CLIPS[0].text])
    seen = []

    def core(query, key, value, **keywords):
        if query.shape[2] == key.shape[2] == 18:
            seen.append((query[0].clone(), key[0].clone()))
        return stock(query, key, value, **keywords)

    stock = F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", core)
        list(model.sample([CLIPS[0].text]))
    captures = capture(model, CLIPS[0].text, [0, 1], [0, 1])
    (after,) = model.sample([CLIPS[0].text])
    assert [(c.layer, c.step) for c in captures] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(c.layout.grid == TokenGrid(3, 2, 3) for c in captures)
    # Two layers; with guidance two forwards a step, of which the prompt's is the first.
    for found, (q, k) in zip(captures, (seen[0], seen[4], seen[1], seen[5]), strict=True):
        assert torch.allclose(found.q, q, atol=1e-4)
        assert torch.allclose(found.k, k, atol=1e-4)
    assert np.allclose(before, after)
    with pytest.raises(ValueError, match="a target with a method applied"):
        dit_sparse.summary(model.pipe)
    assert sum(1 for _ in map_heads(captures)) == 8


def test_a_layer_or_step_that_is_not_there(wan):
    model = Model(open_pipeline(wan, CPU), "wan", (9, 32, 48), steps=2)
    assert layers_of(model) == 2
    with pytest.raises(ValueError, match=r"^Expected the run to have the layers \[2\]"):
        capture(model, "a cow", [2], [0])
    with pytest.raises(ValueError, match=r"none at \(layer, step\) \(0, 7\)"):
        capture(model, "a cow", [0], [7])


def test_samples_do_not_depend_on_the_batch(wan):
    pipe = open_pipeline(wan, CPU)
    prompts = ["a cow", "a red cow", "red"]
    together, alone = (
        list(Model(pipe, "wan", (9, 32, 48), steps=2, batch=batch).sample(prompts))
        for batch in (3, 1)
    )
    assert len(together) == 3
    for one, other in zip(together, alone, strict=True):
        assert one.shape == (9, 32, 48, 3)
        assert np.allclose(one, other, atol=1e-3)
    assert not np.allclose(together[0], together[1], atol=1e-2)


def test_pictures_have_one_frame(flux):
    pipe = open_pipeline(flux, CPU)
    with pytest.raises(ValueError, match=r"^Expected pictures of 1 frame from FluxPipeline"):
        Model(pipe, "flux", (9, 16, 24))
    (clip,) = Model(pipe, "flux", (1, 16, 24), steps=1).sample(["a cow"])
    assert clip.shape == (1, 16, 24, 3)


def test_a_size_that_is_none(wan):
    with pytest.raises(ValueError, match=r"^Expected a size as FRAMESxHEIGHTxWIDTH"):
        run("maps", wan, "128x128", "--to", wan)


def test_the_script_says_in_a_sentence_what_is_wrong(tmp_path):
    done = subprocess.run(
        [sys.executable, "scripts/evaluate_models.py", "maps", "--model", tmp_path, "--to", "no"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("Expected the folder of a diffusers")


def test_methods_are_compared_at_equal_time(wan, tmp_path):
    size = "17x128x128"  # 5 x 8 x 8 tokens: 3 blocks
    run("compare", wan, size, "--to", tmp_path, "--at", "0.5", "--rounds", "2")
    rows = lines_of(tmp_path / "piecewise.jsonl")
    points = [row for row in rows if row["record"] == "point"]
    assert {row["name"] for row in points} == set(compare.NAMES)
    assert all(row["time"] > 0 and 0 < row["error"] < 2 for row in points)
    assert {row["record"] for row in rows} == {"point", "comparison"}
    assert (tmp_path / "piecewise.webp").stat().st_size > 1000
    assert "| heads | of dense time |" in (tmp_path / "piecewise.md").read_text()
