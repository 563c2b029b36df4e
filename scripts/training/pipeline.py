"""The stock pipeline around trained parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from scripts.training.autoencoder import Reconstruction
from scripts.training.checkpoint import Checkpoint
from scripts.training.denoiser import Denoiser
from scripts.training.recipe import Recipe
from scripts.training.tokenizer import from_json
from scripts.training.weights import load_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# To a type checker, diffusers' own class is the stand-in for a missing torch.
Pipeline: TypeAlias = Any

PROMPTS = (
    "a cow",
    "a red apple on a blue background",
    "a rocket moves up over a night sky",
    "a smiling face with heart eyes",
    "a dog spinning over a green background",
    "a rainbow",
    "a thumbs up",
    "a cat and a tree",
)


def build_pipeline(
    recipe: Recipe, vae: Any, denoiser: Denoiser, tokenizer: PreTrainedTokenizerFast
) -> Pipeline:
    """A `WanPipeline` of these very modules; nothing is copied."""
    from diffusers import WanPipeline

    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=denoiser.text_encoder,
        vae=vae,
        scheduler=recipe.build_scheduler(),
        transformer=denoiser.transformer,
    )


def load_vae(checkpoint: Checkpoint, folder: Path) -> Any:
    """The trained VAE, in float32 with bf16 values."""
    vae = checkpoint.models.build_vae()
    load_weights(Reconstruction(vae), checkpoint.read(folder, "vae").tensors)
    return vae.eval().requires_grad_(False)


def load_pipeline(checkpoint: Checkpoint, folder: Path) -> Pipeline:
    """The pipeline of a checkpoint, in float32 with bf16 values.

    Raises:
        ValueError: a part is missing or damaged.
    """
    recipe = checkpoint.models
    vae = load_vae(checkpoint, folder)
    archive = checkpoint.read(folder, "denoiser")
    denoiser = Denoiser(recipe.build_text_encoder(), recipe.build_transformer()).eval()
    load_weights(denoiser, archive.tensors)
    return build_pipeline(recipe, vae, denoiser, from_json(archive.texts["tokenizer.json"]))


def draw_samples(
    pipe: Pipeline,
    prompts: Sequence[str],
    size: tuple[int, int, int],
    *,
    steps: int = 20,
    guidance: float = 4.0,
    seed: int = 0,
) -> list[np.ndarray]:
    """One clip `[F, H, W, 3]` from 0 to 1 for each prompt, of `size` (frames, height, width)."""
    frames, height, width = size
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]
    device = pipe.transformer.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        result = pipe(
            list(prompts),
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
        )
    return list(result.frames)
