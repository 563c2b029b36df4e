"""Pieces of the training scripts, each against what it must equal."""

import json

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import ImageFont

from scripts.data.names import Design
from scripts.data.sprites import Sprites
from scripts.training.archive import Archive, read_shards, write_shards
from scripts.training.autoencoder import Encoder, latent_statistics
from scripts.training.buckets import Bucket, parse_buckets, pick
from scripts.training.checkpoint import open_checkpoint
from scripts.training.clock import Clock
from scripts.training.ema import Average
from scripts.training.history import History
from scripts.training.prefetch import Prefetch
from scripts.training.recipe import TEXT_LENGTH
from scripts.training.sheet import contact_sheet, wrap
from scripts.training.source import Shapes, open_data
from scripts.training.times import draw_times
from scripts.training.tiny_image import TOY_IMAGE
from scripts.training.tiny_video import TINY_VIDEO, TOY
from scripts.training.tokenizer import check_prompts, encode, from_json, to_json, train_tokenizer
from scripts.training.wan_denoiser import WanDenoiser
from scripts.training.weights import load_weights, weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a red circle moves left over a blue background"] * 3, 300)


def lively_denoiser() -> WanDenoiser:
    torch.manual_seed(0)
    denoiser = TOY.build_denoiser()
    with torch.no_grad():
        for parameter in denoiser.transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return denoiser


def test_short_text_equals_the_padding_of_the_stock_pipeline(tokenizer):
    """Training reads 64 text tokens; the stock pipeline reads 512, most of them zeros."""
    denoiser = lively_denoiser()
    vae = TOY.build_vae()
    pipe = TOY.build_pipeline(vae, denoiser, tokenizer)
    prompts = ["a red circle", "a blue circle moves left over a red background"]
    noisy, times = torch.randn(2, 4, 3, 8, 8), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        text, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        long, _ = pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=512
        )
        stock, shorter = (
            denoiser.transformer(
                hidden_states=noisy, timestep=times * 1000, encoder_hidden_states=t
            ).sample
            for t in (long, text)
        )
        denoiser.shorten_text()
        ours = denoiser(noisy, times, *encode(tokenizer, prompts, TEXT_LENGTH))
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-4)
    assert (shorter - stock).abs().max() > 1e-4  # the number of padding tokens matters


def masses_on_text(pipe, prompts: list[str]) -> list[float]:
    """Share of cross-attention on the prompts' own tokens in the default call, by layer."""
    shares = []
    tokens = torch.tensor([len(pipe.tokenizer(prompt)["input_ids"]) for prompt in prompts])

    def measure(attn, arguments, _):
        hidden, text, *_ = arguments
        assert text.shape[1] == 512
        q, k = attn.norm_q(attn.to_q(hidden)), attn.norm_k(attn.to_k(text))
        q, k = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        real = torch.arange(512) < tokens[:, None, None, None]
        shares.append(float((weights * real).sum(-1).mean()))

    for block in pipe.transformer.blocks:
        block.attn2.register_forward_hook(measure)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_frames": 1, "num_inference_steps": 2, "guidance_scale": 1.0}
    pipe(prompts, height=64, width=64, output_type="latent", **arguments)
    return shares


def test_a_fresh_model_attends_to_the_text_and_not_to_its_padding(tokenizer):
    torch.manual_seed(0)
    pipe = TINY_VIDEO.build_pipeline(TINY_VIDEO.build_vae(), TINY_VIDEO.build_denoiser(), tokenizer)
    shares = masses_on_text(pipe, ["a red circle", "a blue circle moves left over a background"])
    assert len(shares) == 2 * TINY_VIDEO.transformer["num_layers"]
    assert min(shares) > 0.4


def test_training_cannot_turn_the_key_of_padding():
    denoiser = TOY.build_denoiser()
    embedder = denoiser.transformer.condition_embedder.text_embedder
    assert not embedder(torch.zeros(1, embedder.linear_1.in_features)).any()
    fixed = [embedder.linear_1.bias, embedder.linear_2.bias]
    fixed += [block.attn2.to_k.bias for block in denoiser.transformer.blocks]
    assert not any(bias.requires_grad for bias in fixed)
    assert all(bias.any() for bias in fixed[2:])


def test_the_flow_is_the_one_that_the_scheduler_integrates():
    """With the true flow, one Euler step from pure noise ends at the clean latents."""
    clean, noise = torch.randn(2, 1, 4, 1, 2, 2).unbind()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(1)
    made = scheduler.step(noise - clean, scheduler.timesteps[0], noise).prev_sample
    torch.testing.assert_close(made, clean)


def test_times_lean_towards_noise_for_larger_clips():
    generator = torch.Generator().manual_seed(0)
    few, many = (draw_times(4000, tokens, generator) for tokens in (256, 25_600))
    assert few.min() > 0
    assert many.max() < 1
    assert few.mean() < many.mean() - 0.2


def test_the_default_clip_has_tokens_enough():
    assert TINY_VIDEO.tokens(49, 128, 128) == 6400
    assert TINY_VIDEO.tokens(49, 256, 256) == 25_600


def test_every_frame_count_of_the_pipeline_is_kept(tokenizer):
    """A temporal factor of 1 would make `WanPipeline` add a frame."""
    pipe = TOY.build_pipeline(TOY.build_vae(), lively_denoiser(), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    for frames in (1, 7):
        made = pipe("a", height=16, width=16, num_frames=frames, num_inference_steps=1)
        assert made.frames.shape == (1, frames, 16, 16, 3)


@pytest.mark.parametrize("size", [(1, 128, 128), (49, 128, 128)])
def test_samples_have_the_noise_levels_of_training(size):
    """A schedule of two steps ends its first where half of the training's noise lies below."""
    scheduler = TINY_VIDEO.build_scheduler(size)
    scheduler.set_timesteps(2)
    median = draw_times(20_001, TINY_VIDEO.tokens(*size), torch.Generator().manual_seed(0)).median()
    assert float(scheduler.sigmas[1]) == pytest.approx(float(median), abs=0.01)


@pytest.mark.parametrize(
    ("caption", "lines"), [("a cow", 1), ("a cow over a blue background", 2), ("cow " * 60, 4)]
)
def test_captions_of_a_sheet_stay_in_their_cell(caption, lines):
    measure = ImageFont.load_default().getlength
    wrapped = wrap(caption, 124)
    assert len(wrapped) == lines
    assert max(map(measure, wrapped)) <= 124
    assert (" ".join(wrapped) == caption) is not wrapped[-1].endswith("...")
    assert len(wrap("cow" * 60, 124)) == 1


def test_a_sheet_has_room_for_its_longest_caption():
    clip = torch.zeros(1, 64, 128, 3).numpy()
    one = contact_sheet([clip] * 2, ["a cow", "a hat"], 7)
    two = contact_sheet([clip] * 2, ["a cow", "a hat over a striped blue background"], 7)
    assert one.width == two.width == 256
    assert 8 < two.height - one.height < 16


def test_archive_restores_bf16_exactly(tmp_path):
    values = torch.randn(40, 25) * torch.logspace(-30, 30, 25)
    values[0, :4] = torch.tensor([0.0, -0.0, float("inf"), -1.0])
    archive = Archive({"b": values, "a": torch.ones(3)}, {"words.txt": "é"})
    read = read_shards(tmp_path, write_shards(archive, tmp_path, "x-1"))
    assert torch.equal(
        read.tensors["b"].view(torch.int16), values.to(torch.bfloat16).view(torch.int16)
    )
    assert torch.equal(read.tensors["a"], torch.ones(3, dtype=torch.bfloat16))
    assert read.texts == {"words.txt": "é"}


def test_trained_looking_weights_shrink(tmp_path):
    shards = write_shards(Archive({"w": torch.randn(512, 512) * 0.02}), tmp_path, "x-1")
    assert sum(shard["bytes"] for shard in shards) < 0.72 * 2 * 512 * 512


def test_archive_is_cut_into_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.training.archive.SHARD_BYTES", 1000)
    shards = write_shards(Archive({"w": torch.arange(2000.0)}), tmp_path, "x-1")
    assert len(shards) > 2
    assert max(shard["bytes"] for shard in shards) <= 1000
    assert read_shards(tmp_path, shards).tensors["w"][1999] == 2000  # in bf16


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda path: path.unlink(), "found none"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), "SHA-256"),
    ],
)
def test_damaged_shards_are_refused(tmp_path, harm, sentence):
    shards = write_shards(Archive({"w": torch.ones(5)}), tmp_path, "x-1")
    harm(tmp_path / shards[0]["name"])
    with pytest.raises(ValueError, match=sentence):
        read_shards(tmp_path, shards)


@pytest.mark.parametrize("text", ["{", "{}", '{"format": 9, "recipe": "toy", "runs": []}'])
def test_damaged_manifests_are_refused(tmp_path, text):
    (tmp_path / "checkpoint.json").write_text(text)
    with pytest.raises(ValueError, match=r"^Expected .* in .*checkpoint\.json"):
        open_checkpoint(tmp_path, "toy")


def test_weights_of_another_recipe_are_refused():
    with pytest.raises(ValueError, match="weights of this recipe"):
        load_weights(torch.nn.Linear(2, 3), weights(torch.nn.Linear(2, 4)))


def test_average_follows_and_shares_nothing():
    source = torch.nn.Linear(2, 2)
    average = Average(source, decay=0.5)
    start = source.weight.detach().clone()
    with torch.no_grad():
        source.weight += 1
    average.update(source)
    rate = 1 - 2 / 11  # early averages move fast
    torch.testing.assert_close(average.model.weight, start + rate)


@pytest.mark.parametrize(
    "prompt", ["", "A Cow!", "naïve café", "日本語 🐄", "x" * 60, "a\nb\tc", "<pad> </s>"]
)
def test_any_prompt_has_tokens(tokenizer, prompt):
    ids, mask = encode(tokenizer, [prompt], 64)
    count = int(mask.sum())
    assert ids[0, count - 1] == tokenizer.eos_token_id
    assert not ids[0, count:].any()
    assert int(ids.max()) < TOY.vocabulary


def test_tokenizer_lowers_case_and_survives_json(tokenizer):
    again = from_json(to_json(tokenizer))
    assert again("A Red CIRCLE")["input_ids"] == tokenizer("a red circle")["input_ids"]
    assert again.decode(again("a red")["input_ids"], skip_special_tokens=True).strip() == "a red"


@pytest.mark.parametrize(
    ("prompts", "sentence"), [([], "not empty"), (["a", "  "], "not empty"), (["zq " * 40], "most")]
)
def test_useless_prompts_are_refused(tokenizer, prompts, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_prompts(tokenizer, prompts)


def test_buckets_read_and_print():
    buckets = parse_buckets("1x64x32:8, 49x128x128:2*3", TOY)
    assert buckets == (Bucket(1, 64, 32, 8), Bucket(49, 128, 128, 2, 3))
    assert [str(bucket) for bucket in buckets] == ["1x64x32:8", "49x128x128:2*3"]


@pytest.mark.parametrize("text", ["", "8x64x64:1", "9x60x64:1", "9x64:1", "9x64x64", "9x64x64:0"])
def test_sizes_that_cannot_be_made_are_refused(text):
    with pytest.raises(ValueError, match=r"^Expected"):
        parse_buckets(text, TOY)


def test_buckets_are_drawn_by_weight_and_step():
    buckets = parse_buckets("1x16x16:1,5x16x16:1*9", TOY)
    drawn = [pick(buckets, 0, step).frames for step in range(500)]
    assert 400 < drawn.count(5) < 490
    assert drawn == [pick(buckets, 0, step).frames for step in range(500)]


def test_clock_warms_up_and_cools_down():
    clock = Clock(minutes=1e6, steps=100, warmup=9, cooldown=0.5)
    rates = [clock.rate(step) for step in (0, 9, 50, 75, 99)]
    assert rates == pytest.approx([0.1, 1, 1, 0.5, 0.02], abs=1e-4)


def test_a_constant_rate_stays_after_the_end():
    assert Clock(minutes=1e6, steps=10, cooldown=0).rate(20) == 1


@pytest.mark.parametrize("wrong", [{"minutes": 0}, {"steps": 0}, {"warmup": -1}, {"cooldown": 2}])
def test_impossible_clocks_are_refused(wrong):
    with pytest.raises(ValueError, match=r"^Expected"):
        Clock(**{"minutes": 1.0, **wrong})


@pytest.mark.parametrize(
    ("recipe", "rows"),
    [(TOY, lambda z: z.transpose(0, 1).flatten(1)), (TOY_IMAGE, lambda z: z.flatten()[None])],
    ids=["every channel of a video", "an image as a whole"],
)
def test_encoder_normalises_latents(recipe, rows):
    vae = recipe.build_vae()
    video, _ = Shapes(CPU).batch(8, recipe.smallest[0], 32, 32, torch.Generator().manual_seed(0))
    statistics = latent_statistics([Encoder(vae, recipe)(video)])
    latents = rows(Encoder(vae, recipe.with_statistics(*statistics))(video))
    assert latents.mean(1).tolist() == pytest.approx([0] * len(latents), abs=1e-5)
    assert latents.std(1).tolist() == pytest.approx([1] * len(latents), abs=1e-3)


def test_shapes_move_as_their_captions_say():
    video, captions = Shapes(CPU).batch(40, 5, 32, 32, torch.Generator().manual_seed(1))
    assert video.shape == (40, 3, 5, 32, 32)
    assert video.abs().max() <= 1
    background = video[:, :, :1, :1, :1]
    mass = (video - background).abs().sum(1)
    columns = (mass * torch.arange(32)).sum((2, 3)) / mass.sum((2, 3))
    for caption, path in zip(captions, columns, strict=True):
        if "left" in caption:
            assert path[-1] < path[0]
        if "right" in caption:
            assert path[-1] > path[0]


def test_missing_data_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="Build it with"):
        open_data(str(tmp_path / "none"), ("clips",), CPU)


def test_history_leaves_out_a_line_that_was_cut_off(tmp_path):
    history = History(tmp_path)
    history.append({"part": "vae", "stage": "vae", "step": 1, "loss": 0.123456789})
    with history.path.open("a") as file:
        file.write('{"part": "va')
    assert [json.dumps(line["loss"]) for line in history.lines()] == ["0.12346"]


def test_prefetch_keeps_the_order_and_ends():
    batches = Prefetch(lambda step: (torch.tensor(step),), 5, CPU)
    assert [int(batches.next()[0]) for _ in range(4)] == [5, 6, 7, 8]
    batches.close()


def test_prefetch_passes_errors_on():
    def make(step: int) -> tuple[torch.Tensor]:
        if step == 1:
            raise ValueError("no such clip")
        return (torch.tensor(step),)

    batches = Prefetch(make, 0, CPU)
    batches.next()
    with pytest.raises(ValueError, match="no such clip"):
        batches.next()
    batches.close()


def test_mixtures_draw_from_all_sources(monkeypatch):
    """Real sprites go through the composer, for training and for held-out clips."""
    designs = tuple(
        Design(name, name, f"a {name}", False, "objects", "", (), True, name == "pear")
        for name in ("cow", "hat", "cup", "pear")
    )
    loaded = []

    def load(folder, kind):
        loaded.append(kind)
        pixels = torch.full((4, 2, 4, 16, 16), 255, dtype=torch.uint8)
        return Sprites(pixels, designs, torch.arange(4), ("",) * 4)

    monkeypatch.setattr("scripts.data.sprites.load_sprites", load)
    data = open_data(".", ("clips", "images"), CPU)
    assert loaded == ["clips", "images"]
    generator = torch.Generator().manual_seed(0)
    video, captions = data.train.batch(3, 5, 32, 32, generator)
    assert video.shape == (3, 3, 5, 32, 32)
    assert len(captions) == 3
    assert len(data.train.captions(8, 1, generator)) == 8
    seen = data.train.captions(60, 1, generator)
    unseen = data.held_out().captions(60, 1, generator)
    assert not any("pear" in caption for caption in seen)
    assert any("pear" in caption for caption in unseen)
    assert {"cow", "pear"} <= set(data.words)
