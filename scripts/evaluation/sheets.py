"""Contact sheets of samples: frames beside each other, and all clips playing at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dit_sparse import media
from dit_sparse.evaluation.prompts import fixed_prompts
from scripts.data.preview import contact_sheet
from scripts.evaluation.clips import HELD_OUT, captions_of, to_video
from scripts.evaluation.model import Model
from scripts.training.source import Source

COLUMNS = 8  # frames of a clip, or half as many pictures, in a row
FPS = 12
_QUALITY = 88


def held_out_prompts(
    model: Model, splits: Mapping[str, Source], count: int, seed: int
) -> dict[str, list[str]]:
    """The fixed prompts, and captions of held-out scenes, by the name of their sheet."""
    composed = {name: captions_of(splits[name], count, model.size, seed) for name in HELD_OUT}
    return {"prompts": list(fixed_prompts(model.size[0])), **composed}


def write_sheets(model: Model, prompts: Mapping[str, Sequence[str]], folder: Path) -> list[Path]:
    """Samples prompts and writes `NAME.webp`, and of clips `NAME-moving.webp`, for each list.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, texts in prompts.items():
        clips = list(model.sample(texts))
        written.append(folder / f"{name}.webp")
        columns = COLUMNS if model.size[0] > 1 else COLUMNS // 2
        sheet = contact_sheet(to_video(clips), list(texts), columns)
        sheet.save(written[-1], quality=_QUALITY)
        if model.size[0] > 1:
            written.append(folder / f"{name}-moving.webp")
            write_moving(clips, written[-1])
    return written


def write_moving(clips: Sequence[np.ndarray], path: Path) -> None:
    """All clips `[F, H, W, 3]` from 0 to 1 playing at once, in order, row by row."""
    frames = [media.contact_sheet(media.as_bytes(frame)) for frame in np.stack(clips, 1)]
    first, *others = (Image.fromarray(frame) for frame in frames)
    pause = round(1000 / FPS)
    first.save(path, save_all=True, append_images=others, duration=pause, loop=0, quality=_QUALITY)
