"""Where training clips and captions come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

#: The name of the drawn data, which need no files.
SHAPES = "shapes"


class Source(Protocol):
    """Makes captioned clips on a device."""

    def batch(
        self, batch: int, frames: int, height: int, width: int, generator: torch.Generator
    ) -> tuple[Tensor, list[str]]:
        """Float `[batch, 3, frames, height, width]` from -1 to 1, and a caption for each."""

    def captions(self, batch: int, frames: int, generator: torch.Generator) -> list[str]:
        """Captions alone."""


@dataclass(frozen=True)
class Data:
    """Where clips come from.

    Args:
        train: clips to train on.
        held_out: opens clips of designs that training never shows.
        words: that prompts may use.
    """

    train: Source
    held_out: Callable[[], Source]
    words: Sequence[str]


def open_data(data: str, kinds: Sequence[str], device: torch.device) -> Data:
    """Opens `"shapes"`, or the sprites of a folder that `scripts/data` has built.

    Args:
        data: `"shapes"` or a folder.
        kinds: which sets of the folder: `"clips"`, `"images"` or both.
        device: on which clips are composed.

    Raises:
        ValueError: the folder is missing or lacks what was asked for.
    """
    if data == SHAPES:
        shapes = Shapes(device)
        return Data(shapes, lambda: shapes, [*COLOURS, *FORMS, *_DIRECTIONS])
    if not Path(data).is_dir():
        raise ValueError(
            f"Expected {SHAPES!r} or a folder of built training data, got {data!r}. "
            "Build it with scripts/data/build_clips.py and scripts/data/build_images.py."
        )
    return _sprites(Path(data), kinds, device)


def _sprites(folder: Path, kinds: Sequence[str], device: torch.device) -> Data:
    from scripts.data.compose import Composer
    from scripts.data.sprites import load_sprites

    sets = [load_sprites(folder, kind) for kind in kinds]

    def source(split: str) -> Source:
        return Mixture(tuple(Composer(sprites, split, device) for sprites in sets))

    return Data(
        source("train"),
        partial(source, "held_out"),
        [word for sprites in sets for word in sprites.words],
    )


@dataclass(frozen=True)
class Mixture:
    """Draws every batch from one of several sources, evenly."""

    sources: tuple[Source, ...]

    def batch(
        self, batch: int, frames: int, height: int, width: int, generator: torch.Generator
    ) -> tuple[Tensor, list[str]]:
        return self._any(generator).batch(batch, frames, height, width, generator)

    def captions(self, batch: int, frames: int, generator: torch.Generator) -> list[str]:
        share = batch // len(self.sources)
        lists = (source.captions(share, frames, generator) for source in self.sources)
        return [caption for captions in lists for caption in captions]

    def _any(self, generator: torch.Generator) -> Source:
        return self.sources[int(torch.randint(len(self.sources), (), generator=generator))]


COLOURS = {
    "red": (0.9, -0.7, -0.7),
    "green": (-0.7, 0.6, -0.6),
    "blue": (-0.7, -0.5, 0.9),
    "yellow": (0.9, 0.8, -0.7),
    "white": (0.95, 0.95, 0.95),
    "black": (-0.95, -0.95, -0.95),
}
FORMS = ("circle", "square", "diamond")
_DIRECTIONS = ("left", "right", "up", "down")


@dataclass(frozen=True)
class Shapes:
    """Coloured shapes that glide over plain backgrounds: training data drawn from formulas."""

    device: torch.device

    def batch(
        self, batch: int, frames: int, height: int, width: int, generator: torch.Generator
    ) -> tuple[Tensor, list[str]]:
        draw = torch.rand(batch, 6, generator=generator)
        picks = (draw[:, :4] * torch.tensor([6, 5, 3, 4])).long().tolist()
        colours, captions = list(COLOURS), []
        fore, back = torch.empty(batch, 3), torch.empty(batch, 3)
        for row, (front, behind, form, way) in enumerate(picks):
            other = (front + 1 + behind) % len(colours)
            fore[row] = torch.tensor(COLOURS[colours[front]])
            back[row] = torch.tensor(COLOURS[colours[other]])
            moves = f" moves {_DIRECTIONS[way]}" if frames > 1 else ""
            captions.append(
                f"a {colours[front]} {FORMS[form]}{moves} over a {colours[other]} background"
            )
        inside = _inside(draw, torch.tensor(picks), (frames, height, width)).to(self.device)
        fore, back = (c.to(self.device)[:, :, None, None, None] for c in (fore, back))
        return back + (fore - back) * inside[:, None], captions

    def captions(self, batch: int, frames: int, generator: torch.Generator) -> list[str]:
        return self.batch(batch, frames, 16, 16, generator)[1]


def _inside(draw: Tensor, picks: Tensor, size: tuple[int, int, int]) -> Tensor:
    """`[B, F, H, W]`: how much of each pixel the shape covers."""
    frames, height, width = size
    time = torch.linspace(-0.5, 0.5, frames) if frames > 1 else torch.zeros(1)
    angle = torch.tensor([math.pi, 0.0, -math.pi / 2, math.pi / 2])[picks[:, 3]]
    x0, y0 = 0.6 * (draw[:, 4] - 0.5), 0.6 * (draw[:, 5] - 0.5)
    x = x0[:, None] + 0.8 * angle.cos()[:, None] * time
    y = y0[:, None] + 0.8 * angle.sin()[:, None] * time
    rows = torch.linspace(-1, 1, height)[:, None] - y[..., None, None]
    columns = torch.linspace(-1, 1, width)[None, :] - x[..., None, None]
    forms = (
        torch.hypot(rows, columns),
        torch.maximum(rows.abs(), columns.abs()),
        rows.abs() + columns.abs(),
    )
    distance = torch.stack(forms)[picks[:, 2], torch.arange(len(picks))]
    return ((0.45 - distance) * min(height, width) / 2).clamp(0, 1)
