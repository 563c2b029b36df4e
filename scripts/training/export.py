"""A checkpoint as the pipeline folder that is shipped: bf16 weights and a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dit_sparse.models.manifest import write_manifest
from scripts.training.card import model_card
from scripts.training.checkpoint import Checkpoint, open_checkpoint
from scripts.training.pipeline import draw_samples, load_pipeline


def export(checkpoint: Path, target: Path, recipe: str) -> str:
    """Writes the averaged weights as the stock `save_pretrained` does, and tries them out.

    The folder is written beside the target, loaded again and sampled from on the CPU; only then
    does it take the target's place.

    Args:
        checkpoint: folder with both parts.
        target: pipeline folder; an earlier one is replaced.
        recipe: name of the recipe.

    Returns:
        A line that says what was written.

    Raises:
        ValueError: a part is missing or damaged, the folder too heavy, or its pictures unsound.
    """
    if target.exists() and not (target / "model_index.json").is_file():
        raise ValueError(
            f"Expected a new folder or an earlier pipeline as the target, got {target}. "
            "Name another one."
        )
    found = open_checkpoint(checkpoint, recipe)
    pipe = load_pipeline(found, checkpoint)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, torch.bfloat16)  # the values are bf16 already: nothing is rounded
    draft = target.with_name(f"{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    pipe.save_pretrained(draft, safe_serialization=True)
    _widen_text(draft)
    (draft / "README.md").write_text(model_card(found, pipe), encoding="utf-8")
    write_manifest(draft)
    size = sum(path.stat().st_size for path in draft.rglob("*") if path.is_file())
    if size > found.models.limit_bytes:
        raise ValueError(
            f"Expected at most {found.models.limit_bytes} bytes, got {size} in {draft}. "
            "Train a smaller recipe."
        )
    _try_out(draft, found)
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    return f"{target}: {size / 1e6:.1f} MB, loads and samples"


def _widen_text(folder: Path) -> None:
    """Has all models load in one dtype, float32 unless another is asked for.

    Without being asked, transformers takes the stored dtype and diffusers float32, and
    `FluxPipeline` does not bring them together.
    """
    for path in folder.glob("text_encoder*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2), encoding="utf-8")


def _try_out(folder: Path, checkpoint: Checkpoint) -> None:
    from diffusers import DiffusionPipeline

    recipe = checkpoint.models
    pipe: Any = DiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.bfloat16, local_files_only=True
    )
    size = recipe.smallest
    clip = draw_samples(recipe, pipe, ["a cow"], size, distilled=checkpoint.distilled, steps=2)[0]
    if clip.shape != (*size, 3) or not np.isfinite(clip).all():
        raise ValueError(
            f"Expected finite pictures of {size} from {folder}, got {clip.shape}. "
            "Train longer or go back to an older checkpoint."
        )
