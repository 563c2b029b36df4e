"""Training of the two parts of the video model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.training import compilation
from scripts.training.autoencoder import (
    Encoder,
    Reconstruction,
    latent_statistics,
    raw_latents,
    reconstruction_psnr,
)
from scripts.training.buckets import Bucket
from scripts.training.denoiser import build_denoiser, shorten_text
from scripts.training.pipeline import build_pipeline, draw_samples, load_vae
from scripts.training.run import CACHE, Request, Run, begin
from scripts.training.sheet import contact_sheet, to_clips
from scripts.training.source import Data, Source, open_data
from scripts.training.stages import FlowMatching, Reconstructing, draw_clips
from scripts.training.tokenizer import check_prompts, from_json, to_json, train_tokenizer

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


def _train_vae(run: Run, data: Data) -> None:
    if "denoiser" in run.checkpoint.parts:
        raise ValueError(
            f"Expected a checkpoint without a denoiser, got {run.out}. A new VAE changes the "
            "latents that the denoiser was trained on: start in a new folder."
        )
    if run.request.latents is not None and not run.checkpoint.latents:
        channels = run.request.latents
        statistics = {"mean": [0.0] * channels, "std": [1.0] * channels}
        run.checkpoint = replace(run.checkpoint, latents=statistics)
    device = run.accelerator.device
    test = _fixed_clips(data.held_out(), run.request.shown, 8)

    def sample(average: Any, path: Path) -> None:
        with torch.no_grad(), _autocast(device):
            made = average.vae.decode(average.vae.encode(test).latent_dist.mean).sample
        rows = [c for pair in zip(to_clips(test), to_clips(made), strict=True) for c in pair]
        names = ["held-out clip", "reconstruction"] * len(test)
        contact_sheet(rows[:8], names[:8], 5).save(path)

    model = Reconstruction(run.checkpoint.models.build_vae())
    average, record = run.train(model, Reconstructing(data.train), sample, lambda _: None)
    record |= _measure(run, average, data, test)
    run.finish(record)


def _measure(run: Run, average: Any, data: Data, test: Tensor) -> dict[str, Any]:
    """Statistics of the latents into the checkpoint, PSNR into the record."""
    device = run.accelerator.device
    with _autocast(device):
        latents = [
            raw_latents(average.vae, _fixed_clips(data.train, run.request.shown, 8, seed))
            for seed in range(1, _STATISTICS + 1)
        ]
        psnr = reconstruction_psnr(average.vae, test)
    mean, std = latent_statistics(latents)
    run.checkpoint = replace(run.checkpoint, latents={"mean": mean, "std": std})
    return {"held_out_psnr_db": round(psnr, 2)}


def _train_denoiser(run: Run, data: Data) -> None:
    folder = run.request.resume or run.out
    if not any("held_out_psnr_db" in record for record in run.checkpoint.runs):
        raise ValueError(
            f"Expected a VAE with measured latents in {folder}, found none: no vae run "
            "was completed. Run that stage, if only for a minute."
        )
    device = run.accelerator.device
    recipe = run.checkpoint.models
    vae = load_vae(run.checkpoint, folder).to(device)
    if "denoiser" in run.checkpoint.parts:
        tokenizer = from_json(run.checkpoint.read(folder, "denoiser").texts["tokenizer.json"])
    else:
        tokenizer = train_tokenizer(_texts(data), recipe.vocabulary)
    run.texts["tokenizer.json"] = to_json(tokenizer)
    prompts = list(run.request.prompts)
    check_prompts(tokenizer, prompts)

    def sample(average: Any, path: Path) -> None:
        pipe = build_pipeline(recipe, vae, average, tokenizer)
        contact_sheet(draw_samples(pipe, prompts, run.request.shown), prompts, 7).save(path)

    def ready(model: Any) -> None:
        shorten_text(model.transformer)
        if run.request.compile:
            compilation.read_cache(folder / CACHE)
            compilation.compile_blocks(model.transformer)

    patch = math.prod(recipe.transformer["patch_size"])
    own = from_json(to_json(tokenizer))  # the pipeline's calls change settings of theirs
    task = FlowMatching(data.train, Encoder(vae), own, patch)
    _, record = run.train(build_denoiser(recipe), task, sample, ready)
    run.finish(record)


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
