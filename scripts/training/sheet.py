"""Contact sheets: clips as rows of frames, stills side by side, captions above."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

_LINE = 12
_LINES = 4  # of a caption at most
_LEFT = 2  # pixels before a line
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
    wide = len(shown) * width
    texts = [wrap(caption, wide - 2 * _LEFT) for caption in captions]
    above = 2 + _LINE * max(map(len, texts))
    high = height + above
    sheet = Image.new("RGB", (across * wide, -(-len(clips) // across) * high), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (clip, lines) in enumerate(zip(clips, texts, strict=True)):
        left, top = place % across * wide, place // across * high
        for number, line in enumerate(lines):
            draw.text((left + _LEFT, top + number * _LINE), line, fill="black")
        pixels = (np.clip(clip[shown], 0, 1) * 255).round().astype(np.uint8)
        strip = Image.fromarray(np.concatenate(list(pixels), axis=1))
        sheet.paste(strip, (left, top + above))
    return sheet


def wrap(caption: str, width: int) -> list[str]:
    """A caption as at most four lines of at most `width` pixels; what is cut off becomes "..."."""
    from PIL import ImageFont

    measure = ImageFont.load_default().getlength
    lines: list[str] = []
    for word in caption.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and measure(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], f"{lines[_LINES - 1]} ..."]
    return [_cut(line, width, measure) for line in lines]


def _cut(line: str, width: int, measure: Callable[[str], float]) -> str:
    """The line, or as much of it as fits before "..."."""
    if measure(line) <= width:
        return line
    kept = line.removesuffix(" ...")
    while kept and measure(f"{kept} ...") > width:
        kept = kept[:-1]
    return f"{kept} ..."


def to_clips(video: Tensor) -> list[np.ndarray]:
    """Clips `[B, 3, F, H, W]` from -1 to 1 as arrays `[F, H, W, 3]` from 0 to 1.

    Stills may come as `[B, 3, H, W]` too.
    """
    clips = video if video.ndim == 5 else video.unsqueeze(2)
    return list(((clips.float() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1).cpu().numpy())
