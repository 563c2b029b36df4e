"""Contact sheets: clips as rows of frames, stills side by side, captions above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

_CAPTION = 14
_STILLS = 4  # side by side


def contact_sheet(
    clips: Sequence[np.ndarray], captions: Sequence[str], columns: int
) -> Image.Image:
    """A picture of clips, one under the other, or of stills, four in a row.

    Args:
        clips: each `[F, H, W, 3]` from 0 to 1, of one height and width.
        captions: one each.
        columns: frames to show, evenly spread; fewer if a clip has fewer.
    """
    from PIL import Image, ImageDraw

    frames, height, width, _ = clips[0].shape
    shown = np.linspace(0, frames - 1, min(columns, frames)).round().astype(int)
    across = min(_STILLS, len(clips)) if frames == 1 else 1
    wide, high = len(shown) * width, height + _CAPTION
    sheet = Image.new("RGB", (across * wide, -(-len(clips) // across) * high), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        left, top = place % across * wide, place // across * high
        draw.text((left + 2, top), caption, fill="black")
        pixels = (np.clip(clip[shown], 0, 1) * 255).round().astype(np.uint8)
        strip = Image.fromarray(np.concatenate(list(pixels), axis=1))
        sheet.paste(strip, (left, top + _CAPTION))
    return sheet


def to_clips(video: Tensor) -> list[np.ndarray]:
    """Clips `[B, 3, F, H, W]` from -1 to 1 as arrays `[F, H, W, 3]` from 0 to 1.

    Stills may come as `[B, 3, H, W]` too.
    """
    clips = video if video.ndim == 5 else video.unsqueeze(2)
    return list(((clips.float() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1).cpu().numpy())
