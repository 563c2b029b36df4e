"""Contact sheets: one row per clip, frames side by side, the caption above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

_CAPTION = 14


def contact_sheet(
    clips: Sequence[np.ndarray], captions: Sequence[str], columns: int
) -> Image.Image:
    """A picture of clips.

    Args:
        clips: each `[F, H, W, 3]` from 0 to 1, of one height and width.
        captions: one each.
        columns: frames to show, evenly spread; fewer if a clip has fewer.
    """
    from PIL import Image, ImageDraw

    frames, height, width, _ = clips[0].shape
    shown = np.linspace(0, frames - 1, min(columns, frames)).round().astype(int)
    size = (len(shown) * width, len(clips) * (height + _CAPTION))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        top = row * (height + _CAPTION)
        draw.text((2, top), caption, fill="black")
        pixels = (np.clip(clip[shown], 0, 1) * 255).round().astype(np.uint8)
        sheet.paste(Image.fromarray(np.concatenate(list(pixels), axis=1)), (0, top + _CAPTION))
    return sheet


def to_clips(video: Tensor) -> list[np.ndarray]:
    """Clips `[B, 3, F, H, W]` from -1 to 1 as arrays `[F, H, W, 3]` from 0 to 1."""
    return list(((video.float() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1).cpu().numpy())
