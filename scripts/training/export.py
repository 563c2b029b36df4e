"""A checkpoint as the pipeline folder that is shipped: bf16 weights and a model card."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dit_sparse.models.manifest import write_manifest
from scripts.training.card import model_card
from scripts.training.checkpoint import open_checkpoint
from scripts.training.pipeline import draw_samples, load_pipeline

#: What one model may weigh, tokenizer and settings included.
LIMIT_BYTES = 40_000_000


def export(checkpoint: Path, target: Path, recipe: str) -> str:
    """Writes the averaged weights as `WanPipeline.save_pretrained` does, and tries them out.

    The folder is written beside the target, loaded again and sampled from on the CPU; only then
    does it take the target's place.

    Args:
        checkpoint: folder with both parts.
        target: pipeline folder; an earlier one is replaced.
        recipe: name of the recipe.

    Returns:
        A line that says what was written.

    Raises:
        ValueError: a part is missing or damaged, the folder is too heavy, or its clip is unsound.
    """
    if target.exists() and not (target / "model_index.json").is_file():
        raise ValueError(
            f"Expected a new folder or an earlier pipeline as the target, got {target}. "
            "Name another one."
        )
    found = open_checkpoint(checkpoint, recipe)
    pipe = load_pipeline(found, checkpoint)
    for part in (pipe.vae, pipe.text_encoder, pipe.transformer):
        nn.Module.to(part, torch.bfloat16)  # the values are bf16 already: nothing is rounded
    draft = target.with_name(f"{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    pipe.save_pretrained(draft, safe_serialization=True)
    (draft / "README.md").write_text(model_card(found, pipe), encoding="utf-8")
    write_manifest(draft)
    size = sum(path.stat().st_size for path in draft.rglob("*") if path.is_file())
    if size > LIMIT_BYTES:
        raise ValueError(f"Expected at most {LIMIT_BYTES} bytes, got {size} in {draft}.")
    _try_out(draft)
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    return f"{target}: {size / 1e6:.1f} MB, loads and samples"


def _try_out(folder: Path) -> None:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, local_files_only=True)
    clip = draw_samples(pipe, ["a cow"], (9, 64, 64), steps=2)[0]
    if clip.shape != (9, 64, 64, 3) or not np.isfinite(clip).all():
        raise ValueError(
            f"Expected a finite clip of 9 frames of 64x64 from {folder}, got {clip.shape}. "
            "Train longer or go back to an older checkpoint."
        )
