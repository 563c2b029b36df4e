"""A checkpoint folder: shards of averaged weights, and a manifest that is written last.

It holds the averages (EMA) in bf16 and the training record, so it is small enough to travel. A run
that resumes from it starts from the averages with a fresh optimizer: the raw weights, AdamW's
moments and the lower bits are lost, and a short warm-up makes up for that. A run that finds the
full state of `state.py` on its own disk loses nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scripts.training.archive import Archive, read_shards, write_atomic, write_shards
from scripts.training.history import History
from scripts.training.recipe import Recipe
from scripts.training.recipes import RECIPES

MANIFEST = "checkpoint.json"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """What the manifest says.

    Args:
        recipe: name of the recipe.
        parts: index of the shards of `"vae"`, `"denoiser"` and, if distilled, `"teacher"`.
        steps: training steps so far, by part.
        latents: per-channel `mean` and `std` of the VAE's latents, and its digest as `vae`.
        runs: one record for each run of the script.
    """

    recipe: str
    parts: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    latents: Mapping[str, Any] = field(default_factory=dict)
    runs: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(
                f"Expected a recipe of {', '.join(RECIPES)}, got {self.recipe!r}. "
                "Use the scripts that wrote this checkpoint."
            )

    @property
    def models(self) -> Recipe:
        """The recipe, its VAE with the measured latent statistics."""
        recipe = RECIPES[self.recipe]
        if not self.latents:
            return recipe
        return recipe.with_statistics(self.latents["mean"], self.latents["std"])

    @property
    def distilled(self) -> bool:
        """Whether the denoiser is guided by its guidance input; its teacher is kept then."""
        return "teacher" in self.parts

    def without_denoiser(self, folder: Path) -> Checkpoint:
        """The same VAE with no denoiser, teacher and records of their runs.

        Raises:
            ValueError: there is no denoiser; `folder` is named in the sentence.
        """
        if "denoiser" not in self.parts:
            raise ValueError(
                f"Expected a denoiser to leave out in {folder}, found none. "
                "Go without --restart-denoiser."
            )
        stages = RECIPES[self.recipe].stages
        vae_stages = {name for name, stage in stages.items() if stage.part == "vae"}
        return replace(
            self,
            parts={"vae": self.parts["vae"]},
            steps={"vae": self.steps["vae"]},
            runs=tuple(run for run in self.runs if run["stage"] in vae_stages),
        )

    def read(self, folder: Path, part: str) -> Archive:
        """The weights of a part.

        Raises:
            ValueError: there are none yet, or a shard is missing or damaged.
        """
        if part not in self.parts:
            raise ValueError(
                f"Expected trained weights of the {part} in {folder}, found none. "
                f"Train the {part} first."
            )
        return read_shards(folder, self.parts[part])


def open_checkpoint(folder: Path, recipe: str) -> Checkpoint:
    """The checkpoint of a folder, or an empty one if the folder has none.

    Raises:
        ValueError: the manifest cannot be read, or belongs to another recipe or format.
    """
    path = folder / MANIFEST
    if not path.exists():
        return Checkpoint(recipe)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content.pop("format")
        checkpoint = Checkpoint(**{**content, "runs": tuple(content["runs"])})
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"Expected a checkpoint manifest in {path}, but it cannot be read: {error!r}."
        ) from error
    if found != FORMAT or checkpoint.recipe != recipe:
        raise ValueError(
            f"Expected format {FORMAT} and recipe {recipe!r} in {path}, got {found} and "
            f"{checkpoint.recipe!r}. Name the right --recipe or folder."
        )
    return checkpoint


def save_part(
    checkpoint: Checkpoint, folder: Path, part: str, archive: Archive, step: int
) -> Checkpoint:
    """Writes a part's shards and then the manifest; shards no longer listed are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = write_shards(archive, folder, f"{part}-{step}")
    checkpoint = replace(
        checkpoint,
        parts={**checkpoint.parts, part: shards},
        steps={**checkpoint.steps, part: step},
    )
    write_manifest(checkpoint, folder)
    return checkpoint


def write_manifest(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes the manifest and removes shards that it does not list."""
    content = {
        "format": FORMAT,
        "recipe": checkpoint.recipe,
        "parts": dict(checkpoint.parts),
        "steps": dict(checkpoint.steps),
        "latents": dict(checkpoint.latents),
        "runs": list(checkpoint.runs),
    }
    write_atomic(folder / MANIFEST, json.dumps(content, indent=1).encode())
    listed = {shard["name"] for shards in checkpoint.parts.values() for shard in shards}
    for path in folder.glob("*-*.bin"):
        if path.name not in listed:
            path.unlink()


def copy_checkpoint(checkpoint: Checkpoint, source: Path, target: Path) -> None:
    """Copies the listed shards and their history, so that the target is whole by itself."""
    if source.resolve() == target.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    for shards in checkpoint.parts.values():
        for shard in shards:
            if (source / shard["name"]).exists():
                shutil.copyfile(source / shard["name"], target / shard["name"])
    History(source).copy(History(target), checkpoint.parts)
    write_manifest(checkpoint, target)
