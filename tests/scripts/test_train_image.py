"""The image recipe: its pieces against the stock pipeline, and a whole run with a toy."""

import random

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from scripts.train import parser, request_of
from scripts.training.buckets import Bucket, parse_buckets
from scripts.training.checkpoint import open_checkpoint
from scripts.training.export import export
from scripts.training.flux_denoiser import (
    SIGHT,
    FluxDenoiser,
    RepeatedPadding,
    pack,
    positions,
    unpack,
)
from scripts.training.image_recipe import build_scheduler
from scripts.training.loop import Randomness
from scripts.training.parts import train_part
from scripts.training.pipeline import load_pipeline
from scripts.training.recipe import TEXT_LENGTH
from scripts.training.tasks import Distilling
from scripts.training.times import time_shift
from scripts.training.tiny_image import TINY_IMAGE, TOY_IMAGE
from scripts.training.tokenizer import encode, train_tokenizer

PROMPTS = ["a red circle", "a blue circle moves left over a red background"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a red circle moves left over a blue background"] * 3, 300)


def lively_denoiser() -> FluxDenoiser:
    """With random numbers in place of the zeros that close the gates."""
    torch.manual_seed(0)
    denoiser = TOY_IMAGE.build_denoiser()
    with torch.no_grad():
        for parameter in denoiser.transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return denoiser.eval().requires_grad_(False)


def stock_call(pipe: FluxPipeline, prompts: list[str]) -> tuple[dict, torch.Tensor]:
    """What a default call gives the transformer in its only step, and what that returns."""
    calls = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, _, arguments, output: calls.append((arguments, output[0])), with_kwargs=True
    )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    pipe(
        prompts,
        height=32,
        width=48,
        num_inference_steps=1,
        generator=generator,
        output_type="latent",
    )
    hook.remove()
    return calls[0]


def pipeline_of(denoiser: FluxDenoiser, tokenizer) -> FluxPipeline:
    return TOY_IMAGE.build_pipeline(TOY_IMAGE.build_vae(), denoiser, tokenizer)


def test_training_computes_what_the_default_call_of_the_pipeline_does(tokenizer):
    """Packing, positions, guidance, both texts, and 64 text tokens in place of 512."""
    denoiser = lively_denoiser()
    given, stock = stock_call(pipeline_of(denoiser, tokenizer), PROMPTS)
    assert given["encoder_hidden_states"].shape[1] == 512
    noisy = unpack(given["hidden_states"], 16, 24)
    torch.testing.assert_close(pack(noisy), given["hidden_states"])
    torch.testing.assert_close(positions(8, 12, noisy.device), given["img_ids"])
    text = encode(tokenizer, PROMPTS, TEXT_LENGTH)
    arguments = (noisy, given["timestep"], *text)
    short = denoiser(*arguments, given["guidance"])
    denoiser.shorten_text()
    ours = denoiser(*arguments, given["guidance"])
    torch.testing.assert_close(pack(ours), stock, atol=1e-5, rtol=1e-4)
    assert (pack(short) - stock).abs().max() > 1e-3  # the number of padding tokens matters
    assert (denoiser(*arguments) - ours).abs().max() > 1e-3  # and so does guidance


@pytest.mark.parametrize("tokens", [2, TEXT_LENGTH - 1 - 2 * SIGHT])
def test_padding_is_one_vector_whatever_the_length(tokens):
    denoiser = TOY_IMAGE.build_denoiser().eval()
    ids = torch.zeros(1, 512, dtype=torch.int64)
    ids[0, :tokens] = torch.arange(2, 2 + tokens)
    with torch.no_grad():
        long, short = denoiser.text_encoder_2(ids)[0][0], denoiser.text_of(ids[:, :TEXT_LENGTH])[0]
    last = short[-1].expand(512 - TEXT_LENGTH, -1)
    torch.testing.assert_close(short, long[:TEXT_LENGTH])
    torch.testing.assert_close(last, long[TEXT_LENGTH:])
    assert (short[tokens] - short[-1]).abs().max() > 1e-3  # near the caption it is another


def test_training_leaves_the_blind_buckets_alone():
    encoder = TOY_IMAGE.build_denoiser().text_encoder_2
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    encoder(torch.arange(TEXT_LENGTH)[None])[0].square().sum().backward()
    blind = bias[:, 0] < -1000
    assert int(blind.sum()) == 2
    assert not bias.grad[blind].any()
    assert bias.grad[~blind].any()


def test_repeated_padding_is_attention_to_copies_of_a_token():
    core = RepeatedPadding(3, 5)
    q, k, v = (torch.randn(2, 10, 2, 64) for _ in range(3))
    keys, values = (torch.cat([x, x[:, 3:4].expand(-1, 5, -1, -1)], 1) for x in (k, v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, keys).div(8).softmax(-1)
    wanted = torch.einsum("bhqk,bkhd->bqhd", weights, values)
    torch.testing.assert_close(core.dispatch(q, k, v), wanted)


def test_a_shortened_text_keeps_cudnn_out():
    """Its attention, with more keys than queries, is suspected of an illegal memory access."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        TOY_IMAGE.build_denoiser().shorten_text()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_repeated_padding_refuses_what_it_would_not_heed():
    q = torch.randn(1, 4, 1, 64)
    with pytest.raises(ValueError, match="without mask"):
        RepeatedPadding(3, 5).dispatch(q, q, q, attn_mask=torch.ones(4, 9))


class Teacher(nn.Module):
    """Flow 1 for the empty caption, which is one token long, and 3 for others."""

    def forward(self, noisy, times, ids, mask):
        value = torch.where(mask.sum(1) > 1, 3.0, 1.0)
        return value.view(-1, 1, 1, 1).expand_as(noisy)


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.scales = None

    def forward(self, noisy, times, ids, mask, scales):
        self.scales = scales
        return (1 + 2 * scales).view(-1, 1, 1, 1).expand_as(noisy)


def test_distillation_aims_at_classifier_free_guidance(tokenizer):
    """With flows 3 and 1, guidance g must give 1 + 2 g."""
    latents = torch.randn(64, 4, 8, 8)
    ids, mask = encode(tokenizer, ["a red circle"] * 64, TEXT_LENGTH)

    def examples(bucket, draws):
        return latents, ids, mask

    task, student = Distilling(examples, tokenizer, 4, Teacher()), Student()
    draws = Randomness(torch.Generator(), random.Random(0), torch.Generator().manual_seed(0))
    batch = task.batch(Bucket(1, 32, 32, 64), draws)
    assert float(task.loss(student, batch, draws)) == pytest.approx(0, abs=1e-10)
    assert 1 <= student.scales.min() < 1.5
    assert 5.5 < student.scales.max() <= 6


@pytest.mark.parametrize("tokens", [4096, 16_384])
def test_sampling_shifts_as_training_does(tokens):
    scheduler = build_scheduler()
    config = scheduler.config
    mu = calculate_shift(
        tokens,
        config.base_image_seq_len,
        config.max_image_seq_len,
        config.base_shift,
        config.max_shift,
    )
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=mu)
    shift = time_shift(tokens)
    assert float(scheduler.sigmas[1]) == pytest.approx(shift / (1 + shift))


def test_the_default_picture_has_tokens_enough():
    pipe_default = 128 * 2  # pixels: `default_sample_size` times the VAE's factor
    assert TINY_IMAGE.tokens(1, pipe_default, pipe_default) == 4096


def test_the_export_will_be_light_enough():
    modules = (TINY_IMAGE.build_vae(), TINY_IMAGE.build_denoiser())
    count = sum(p.numel() for module in modules for p in module.parameters())
    assert count > 10e6
    assert 2 * count + 500_000 < TINY_IMAGE.limit_bytes  # two tokenizers of 200 kB each


@pytest.mark.parametrize("text", ["5x64x64:1", "1x66x64:1"])
def test_sizes_that_cannot_be_made_are_refused(text):
    with pytest.raises(ValueError, match=r"^Expected 1 frame and sides that are multiples of 4"):
        parse_buckets(text, TOY_IMAGE)


SMALL = ("--recipe", "toy-image", "--data", "shapes", "--warmup", "0", "--cooldown", "0")
BOX = ("--minutes", "1e6", "--log-every", "2", "--uses", "1", "--sizes", "1x32x32:2,1x16x24:2")


def run(stage: str, out, steps: int, prompts, *more: object) -> None:
    """What the script does with these arguments, in this process."""
    rest = ("--shown", "1x16x16", "--steps", steps, "--out", out, "--prompts", prompts, *more)
    train_part(request_of(parser().parse_args([str(a) for a in (stage, *SMALL, *BOX, *rest)])))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red circle\na blue square\n")
    return path


@pytest.fixture(scope="module")
def base(prompts, tmp_path_factory):
    """Three steps of the VAE and four of the denoiser; its gates are open a little."""
    out = tmp_path_factory.mktemp("base")
    run("vae", out, 3, prompts)
    run("base", out, 4, prompts, "--lr", 0.01)
    return out


@pytest.fixture(scope="module")
def distilled(base, prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("distilled")
    run("distil", out, 4, prompts, "--resume", base)
    return out


def weights_of(folder, part: str) -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(folder, "toy-image").read(folder, part).tensors)


def test_distillation_keeps_its_teacher(base, distilled):
    found = open_checkpoint(distilled, "toy-image")
    assert found.steps == {"vae": 3, "denoiser": 8, "teacher": 4}
    before, teacher = weights_of(base, "denoiser"), weights_of(distilled, "teacher")
    assert all(torch.equal(before[name], teacher[name]) for name in before)
    after = weights_of(distilled, "denoiser")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert (distilled / "samples.png").is_file()


def test_a_resumed_distillation_has_the_same_teacher(base, distilled, prompts, tmp_path):
    out, state = tmp_path / "out", tmp_path / "state"
    run("distil", out, 2, prompts, "--resume", base, "--state", state)
    run("distil", out, 2, prompts, "--state", state)
    expected, found = weights_of(distilled, "denoiser"), weights_of(out, "denoiser")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_export_is_a_stock_pipeline(distilled, tmp_path):
    target = tmp_path / "pipe"
    assert "loads and samples" in export(distilled, target, "toy-image")
    card = (target / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card
    assert "| distil |" in card
    pipe = FluxPipeline.from_pretrained(target, local_files_only=True)
    ours = load_pipeline(open_checkpoint(distilled, "toy-image"), distilled)
    pictures = []
    for some in (pipe, ours):
        some.set_progress_bar_config(disable=True)
        arguments = TOY_IMAGE.call(["a red circle"], (1, 16, 32), distilled=True)
        generator = torch.Generator().manual_seed(0)
        result = some(**arguments, num_inference_steps=2, generator=generator, output_type="np")
        pictures += TOY_IMAGE.clips(result)
    assert pictures[0].shape == (1, 16, 32, 3)
    assert np.abs(pictures[0] - pictures[1]).max() < 1e-3


def test_stages_out_of_order_are_a_sentence(base, distilled, prompts, tmp_path):
    with pytest.raises(ValueError, match="not distilled"):
        run("base", tmp_path / "a", 1, prompts, "--resume", distilled)
    run("vae", tmp_path / "b", 1, prompts)
    with pytest.raises(ValueError, match="Run the stages before"):
        run("distil", tmp_path / "b", 1, prompts)
    with pytest.raises(ValueError, match=r"^Expected a stage of toy-image \(vae, base, large"):
        run("clips", tmp_path / "c", 1, prompts)
