"""Loads a built set of sprites into memory."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scripts.data.names import Design
from scripts.data.pixels import decode
from scripts.data.shards import read_files, read_index

KINDS = ("clips", "images")


@dataclass(frozen=True, eq=False)
class Sprites:
    """Pictures or clips with what they show.

    Attributes:
        pixels: uint8 [n, frames, 4, S, S], RGBA with colours premultiplied by alpha; stills have
            one frame, clips loop.
        designs: The distinct designs.
        design_of: int64 [n], which of `designs` each picture draws.
        motions: What each clip does by itself ("bobbing", "swaying", "pulsing", "").
    """

    pixels: Tensor
    designs: tuple[Design, ...]
    design_of: Tensor
    motions: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = tuple(self.pixels.shape)
        if self.pixels.dtype != torch.uint8 or len(shape) != 5 or shape[2] != 4:
            raise ValueError(
                f"Expected pixels uint8 [n, frames, 4, S, S], got {self.pixels.dtype} {shape}. "
                f"Load them with load_sprites."
            )
        if len(self.design_of) != shape[0] or len(self.motions) != shape[0]:
            raise ValueError(
                f"Expected a design and a motion for each of {shape[0]} pictures, got "
                f"{len(self.design_of)} and {len(self.motions)}. Pass one for each picture."
            )

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def where(self, rows: Tensor) -> Sprites:
        """The pictures that bool [n] `rows` selects, with the designs as they are."""
        motions = tuple(self.motions[i] for i in rows.nonzero().flatten().tolist())
        return Sprites(self.pixels[rows], self.designs, self.design_of[rows], motions)

    @property
    def names(self) -> list[str]:
        """Name of every picture, [n]."""
        return [self.designs[i].name for i in self.design_of.tolist()]

    @property
    def held_out(self) -> Tensor:
        """bool [n]: pictures of designs that training never sees."""
        held = torch.tensor([design.held_out for design in self.designs], dtype=torch.bool)
        return held[self.design_of]

    @property
    def words(self) -> list[str]:
        """Sorted distinct words of all phrases and tags, held-out designs included."""
        texts = (text for d in self.designs for text in (d.phrase, *d.tags))
        return sorted({word for text in texts for word in text.split()})


def load_sprites(folder: Path | str, kind: str, *, workers: int | None = None) -> Sprites:
    """Decodes a built set.

    Args:
        folder: Where the sets lie, each in a folder named by its kind.
        kind: "clips" (animated) or "images" (stills).
        workers: Decoding threads (the decoder works outside Python's lock); all cores by default.

    Raises:
        ValueError: unknown kind, or an index and shards that do not belong together.
        FileNotFoundError: the set is not built; the sentence names the builder.
        RuntimeError: this Pillow cannot read AVIF.
    """
    if kind not in KINDS:
        raise ValueError(f"Expected kind to be one of {KINDS}, got {kind!r}. Name a built set.")
    folder = Path(folder)
    index = read_index(folder, kind)
    row = {picture.file: i for i, picture in enumerate(index.pictures)}
    pixels = np.empty((len(row), index.frames, 4, index.size, index.size), dtype=np.uint8)

    def place(file: tuple[str, bytes]) -> None:
        name, content = file
        frames = decode(content)
        if name not in row or frames.shape != (index.frames, index.size, index.size, 4):
            raise ValueError(
                f"Expected {name} with {index.frames} frames of {index.size} pixels in the index, "
                f"got {frames.shape}. Build the set again."
            )
        pixels[row[name]] = frames.transpose(0, 3, 1, 2)

    files = read_files(folder, index)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        done = tqdm(
            pool.map(place, files),
            total=len(row),
            desc=f"decoding {kind}",
            unit="file",
            mininterval=1,
        )
        if sum(1 for _ in done) != len(row):
            raise ValueError(
                f"Expected {len(row)} pictures in the shards of {kind}, got another number. "
                f"Build the set again."
            )
    codes = {code: i for i, code in enumerate(index.designs)}
    return Sprites(
        pixels=torch.from_numpy(pixels),
        designs=tuple(index.designs.values()),
        design_of=torch.tensor([codes[picture.design] for picture in index.pictures]),
        motions=tuple(picture.motion for picture in index.pictures),
    )
