"""Clips beside each other: dense, with the method, and what differs, amplified."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

AMPLIFIED = 4
_COLUMNS = 6  # frames of a clip on a sheet
_WIDTH = 256  # pixels of a frame, at most
_QUALITY = 82
_MOVING = 24  # frames of a moving picture, at most; these weigh most of a page
_MOVING_WIDTH = 192
_MOVING_QUALITY = 55
_GAP = 2


def difference(clip: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """Absolute differences of uint8 frames, times `AMPLIFIED`."""
    apart = np.abs(clip.astype(np.int16) - dense) * AMPLIFIED
    return apart.clip(0, 255).astype(np.uint8)


def sheet(clip: np.ndarray, dense: np.ndarray) -> bytes:
    """WebP of evenly spread frames `[F, H, W, 3]`: rows dense, method and difference."""
    shown = spread(len(clip), _COLUMNS)
    rows = [dense[shown], clip[shown], difference(clip[shown], dense[shown])]
    return _webp([_grid([[_small(frame, _WIDTH) for frame in row] for row in rows])], _QUALITY)


def moving(clip: np.ndarray, dense: np.ndarray, fps: float = 12.0) -> bytes:
    """Animated WebP: dense, method and difference beside each other."""
    shown = spread(len(clip), _MOVING)
    rows = (dense[shown], clip[shown], difference(clip[shown], dense[shown]))
    frames = [
        _grid([[_small(frame, _MOVING_WIDTH) for frame in cells]])
        for cells in zip(*rows, strict=True)
    ]
    return _webp(frames, _MOVING_QUALITY, 1000 * len(clip) / len(shown) / fps)


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` numbers, evenly spread, ends included."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def _small(frame: np.ndarray, most: int) -> np.ndarray:
    height, width = frame.shape[:2]
    if width <= most:
        return frame
    size = (most, max(1, round(height * most / width)))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))


def _grid(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    lines = [np.concatenate([_padded(cell) for cell in row], axis=1) for row in rows]
    return np.concatenate(lines, axis=0)[_GAP:, _GAP:]


def _padded(frame: np.ndarray) -> np.ndarray:
    padding = ((_GAP, 0), (_GAP, 0), (0, 0))
    return np.pad(frame, padding, constant_values=255)


def _webp(frames: Sequence[np.ndarray], quality: int, pause: float = 0.0) -> bytes:
    first, *others = (Image.fromarray(frame) for frame in frames)
    file = io.BytesIO()
    if others:
        first.save(
            file,
            "WEBP",
            save_all=True,
            append_images=others,
            duration=max(20, round(pause)),
            loop=0,
            quality=quality,
        )
    else:
        first.save(file, "WEBP", quality=quality)
    return file.getvalue()
