"""Training of the two parts of a model: VAE and denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scripts.training import compilation
from scripts.training.autoencoder import (
    Encoder,
    Reconstruction,
    latent_statistics,
    raw_latents,
    reconstruction_psnr,
)
from scripts.training.buckets import Bucket
from scripts.training.loop import Task
from scripts.training.pipeline import draw_samples, load_vae
from scripts.training.replay import Replay
from scripts.training.run import CACHE, Request, Run, begin
from scripts.training.sheet import contact_sheet, to_clips
from scripts.training.source import Data, Source, open_data
from scripts.training.stage import Goal
from scripts.training.tasks import Captioned, Distilling, FlowMatching, Reconstructing, draw_clips
from scripts.training.tokenizer import check_prompts, from_json, to_json, train_tokenizer
from scripts.training.weights import load_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: Batches for latent statistics, and captions for the tokenizer.
_STATISTICS = 16
_CAPTIONS = 8192


def train_part(request: Request) -> None:
    """Runs the stage of a request.

    Raises:
        ValueError: data or checkpoint are missing or damaged, or a prompt is of no use.
        RuntimeError: the loss is no longer finite.
    """
    run = begin(request)
    data = open_data(request.data, request.kinds, run.accelerator.device)
    with torch.random.fork_rng():
        torch.manual_seed(request.plan.seed)
        (_train_vae if run.part == "vae" else _train_denoiser)(run, data)
    run.peers.wait()


def _train_vae(run: Run, data: Data) -> None:
    if "denoiser" in run.checkpoint.parts:
        raise ValueError(
            f"Expected a checkpoint without a denoiser, got {run.out}. A new VAE changes the "
            "latents that the denoiser was trained on: start in a new folder, with --resume and "
            "--restart-denoiser to keep this VAE."
        )
    if run.request.latents is not None and not run.checkpoint.latents:
        channels = run.request.latents
        statistics = {"mean": [0.0] * channels, "std": [1.0] * channels}
        run.checkpoint = replace(run.checkpoint, latents=statistics)
    device, recipe = run.accelerator.device, run.checkpoint.models
    test = recipe.for_vae(_fixed_clips(data.held_out(), run.request.shown, 8))

    def sample(average: Any, path: Path) -> None:
        with torch.no_grad(), _autocast(device):
            made = average.vae.decode(average.vae.encode(test).latent_dist.mean).sample
        rows = [c for pair in zip(to_clips(test), to_clips(made), strict=True) for c in pair]
        names = ["held out", "reconstruction"] * len(test)
        contact_sheet(rows[:8], names[:8], 5).save(path)

    model = Reconstruction(recipe.build_vae(), recipe)
    task = Reconstructing(data.train, recipe)
    average, record = run.train(model, task, sample, lambda _: None)
    record |= _measure(run, average, data, test)
    run.finish(record)


def _measure(run: Run, average: Any, data: Data, test: Tensor) -> dict[str, Any]:
    """Statistics of the latents into the checkpoint, PSNR into the record."""
    device, recipe = run.accelerator.device, run.checkpoint.models
    with _autocast(device):
        latents = [
            raw_latents(average.vae, recipe, _fixed_clips(data.train, run.request.shown, 8, seed))
            for seed in range(1, _STATISTICS + 1)
        ]
        psnr = reconstruction_psnr(average.vae, test)
    mean, std = latent_statistics(latents)
    run.checkpoint = replace(run.checkpoint, latents={"mean": mean, "std": std})
    return {"held_out_psnr_db": round(psnr, 2)}


def _train_denoiser(run: Run, data: Data) -> None:
    folder = run.request.resume or run.out
    _check_order(run, folder)
    recipe = run.checkpoint.models
    vae = load_vae(run.checkpoint, folder).to(run.accelerator.device)
    tokenizer = _tokenizer(run, data, folder)
    prompts = list(run.request.prompts)
    check_prompts(tokenizer, prompts)
    distilled = run.request.settings.goal is Goal.DISTILLATION

    def sample(average: Any, path: Path) -> None:
        pipe = recipe.build_pipeline(vae, average, tokenizer)
        # The pipeline's own shift is one for long clips: a still gets too few steps at the end.
        pipe.scheduler = recipe.build_scheduler(run.request.shown)
        clips = draw_samples(recipe, pipe, prompts, run.request.shown, distilled=distilled)
        contact_sheet(clips, prompts, 7).save(path)

    def ready(model: Any) -> None:
        model.shorten_text()
        if run.request.compile:
            compilation.read_cache(folder / CACHE)
            compilation.compile_blocks(model.transformer)

    own = from_json(to_json(tokenizer))  # the pipeline's calls change settings of theirs
    examples = Replay(Captioned(data.train, Encoder(vae, recipe), own), run.request.uses)
    task: Task = FlowMatching(examples, recipe.patch)
    if distilled:
        task = Distilling(examples, own, recipe.patch, _teacher(run, folder, ready))
    _, record = run.train(recipe.build_denoiser(), task, sample, ready)
    run.finish(record)


def _check_order(run: Run, folder: Path) -> None:
    if not any("held_out_psnr_db" in record for record in run.checkpoint.runs):
        raise ValueError(
            f"Expected a VAE with measured latents in {folder}, found none: no vae run "
            "was completed. Run that stage, if only for a minute."
        )
    goal = run.request.settings.goal
    if goal is Goal.FLOW and run.checkpoint.distilled:
        raise ValueError(
            f"Expected a denoiser that is not distilled in {folder}, got one that is: this stage "
            "would undo it. Go back to the checkpoint before."
        )
    if goal is Goal.DISTILLATION and "denoiser" not in run.checkpoint.parts:
        raise ValueError(
            f"Expected a trained denoiser to distil in {folder}, found none. Run the stages before."
        )


def _tokenizer(run: Run, data: Data, folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of the checkpoint, or a new one for it."""
    if "denoiser" in run.checkpoint.parts:
        tokenizer = from_json(run.checkpoint.read(folder, "denoiser").texts["tokenizer.json"])
    else:
        made = train_tokenizer(_texts(data), run.checkpoint.models.vocabulary)
        tokenizer = from_json(run.peers.agree(to_json(made)))
    run.texts["tokenizer.json"] = to_json(tokenizer)
    return tokenizer


def _teacher(run: Run, folder: Path, ready: Callable[[Any], None]) -> nn.Module:
    """The denoiser before it was distilled; from now on the checkpoint keeps its shards too."""
    checkpoint = run.checkpoint
    if not checkpoint.distilled:
        run.checkpoint = checkpoint = replace(
            checkpoint,
            parts={**checkpoint.parts, "teacher": checkpoint.parts["denoiser"]},
            steps={**checkpoint.steps, "teacher": checkpoint.steps["denoiser"]},
        )
    teacher = checkpoint.models.build_denoiser().eval().requires_grad_(False)
    load_weights(teacher, checkpoint.read(folder, "teacher").tensors)
    ready(teacher.to(run.accelerator.device))
    return teacher


def _texts(data: Data) -> Iterator[str]:
    """Captions of stills and clips, and the words of all sprites, held-out ones too."""
    generator = torch.Generator().manual_seed(0)
    for frames in (1, 25):
        yield from data.train.captions(_CAPTIONS // 2, frames, generator)
    yield from data.words


def _fixed_clips(source: Source, size: tuple[int, int, int], batch: int, seed: int = 0) -> Tensor:
    """The same clips in every run, of `size` (frames, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    return draw_clips(source, Bucket(*size, batch), generator)[0]


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
