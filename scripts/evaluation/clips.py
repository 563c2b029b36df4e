"""Real clips to compare with: composed scenes of a split, drawn a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scripts.training.source import SHAPES, Shapes, Source

#: What training never shows: new scenes of designs that it shows, and designs that it does not.
HELD_OUT = ("compositions", "held_out")
_AT_ONCE = 16  # clips; part of what a seed means, as in `Composer.held_out`


def open_splits(data: str, kind: str, device: torch.device) -> Mapping[str, Source]:
    """Sources of the splits "train", "compositions" and "held_out".

    Args:
        data: folder of built sets; or "shapes", which has one kind of scene for all splits.
        kind: set of the folder, "clips" or "images".
        device: where clips are composed.

    Raises:
        ValueError, FileNotFoundError: as `scripts.data.sprites.load_sprites`.
    """
    names = ("train", *HELD_OUT)
    if data == SHAPES:
        return dict.fromkeys(names, Shapes(device))
    from scripts.data.compose import Composer
    from scripts.data.sprites import load_sprites

    sprites = load_sprites(Path(data), kind)
    return {name: Composer(sprites, name, device) for name in names}


def draw(
    source: Source, count: int, size: tuple[int, int, int], seed: int
) -> Iterator[tuple[Tensor, list[str]]]:
    """Batches of (clips float `[b, 3, F, H, W]` from -1 to 1, captions), `count` clips in all.

    Draws of different seeds share no scene; a longer draw begins with a shorter one up to whole
    batches of 16.
    """
    generator = torch.Generator().manual_seed(seed)
    for begin in range(0, count, _AT_ONCE):
        yield source.batch(min(_AT_ONCE, count - begin), *size, generator)


def captions_of(source: Source, count: int, size: tuple[int, int, int], seed: int) -> list[str]:
    """The captions of `draw` with the same arguments."""
    return [text for _, captions in draw(source, count, size, seed) for text in captions]


def spread_frames(video: Tensor, count: int) -> Tensor:
    """Evenly spread frames of clips, ends included.

    Args:
        video: `[B, 3, F, H, W]` from -1 to 1.
        count: frames of each clip; all if a clip has no more.

    Returns:
        `[B, min(count, F), 3, H, W]` from 0 to 1.
    """
    frames = video.shape[2]
    shown = torch.linspace(0, frames - 1, min(count, frames)).round().long()
    return ((video[:, :, shown] + 1) / 2).clamp(0, 1).transpose(1, 2)


def to_video(clips: Sequence[np.ndarray]) -> Tensor:
    """Samples `[F, H, W, 3]` from 0 to 1 as float32 `[B, 3, F, H, W]` from -1 to 1."""
    return torch.from_numpy(np.stack(clips)).float().permute(0, 4, 1, 2, 3) * 2 - 1
