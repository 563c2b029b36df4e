"""The stock pipeline around trained parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.training.autoencoder import Reconstruction
from scripts.training.checkpoint import Checkpoint
from scripts.training.recipe import Pipeline, Recipe, Size
from scripts.training.tokenizer import from_json
from scripts.training.weights import load_weights

PROMPTS = (
    "a cow",
    "a rocket moves up over a night sky",
    "a smiling face with heart eyes",
    "a dog on a blue background",
    "a fox spinning over a green background",
    "a rainbow",
    "a butterfly moves left over a yellow background",
    "a cat face and a snowman",
)


def load_vae(checkpoint: Checkpoint, folder: Path) -> Any:
    """The trained VAE, in float32 with bf16 values."""
    recipe = checkpoint.models
    vae = recipe.build_vae()
    load_weights(Reconstruction(vae, recipe), checkpoint.read(folder, "vae").tensors)
    return vae.eval().requires_grad_(False)


def load_pipeline(checkpoint: Checkpoint, folder: Path) -> Pipeline:
    """The pipeline of a checkpoint, in float32 with bf16 values.

    Raises:
        ValueError: a part is missing or damaged.
    """
    recipe = checkpoint.models
    vae = load_vae(checkpoint, folder)
    archive = checkpoint.read(folder, "denoiser")
    denoiser = recipe.build_denoiser().eval()
    load_weights(denoiser, archive.tensors)
    return recipe.build_pipeline(vae, denoiser, from_json(archive.texts["tokenizer.json"]))


def draw_samples(
    recipe: Recipe,
    pipe: Pipeline,
    prompts: Sequence[str],
    size: Size,
    *,
    distilled: bool,
    steps: int = 20,
    seed: int = 0,
) -> list[np.ndarray]:
    """One clip `[F, H, W, 3]` from 0 to 1 for each prompt, of `size` (frames, height, width)."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]
    device = pipe.transformer.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        result = pipe(
            **recipe.call(prompts, size, distilled=distilled),
            num_inference_steps=steps,
            generator=generators,
            output_type="np",
        )
    return recipe.clips(result)
