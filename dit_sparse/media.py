"""Writes frames to mp4, gif and png files."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

logger = logging.getLogger("dit_sparse")

VIDEO_SUFFIXES = (".mp4", ".gif")
SUFFIXES = (*VIDEO_SUFFIXES, ".png")

# Rounding in a decoder may leave [0, 1] by this much; more means another scale (0..255, -1..1).
_RANGE_SLACK = 1e-2


def check_output(path: str | Path) -> Path:
    """Checks that a picture can be written to `path`, without writing one.

    Returns:
        The path.

    Raises:
        ValueError: the suffix is unknown, or the folder is missing or cannot be written to.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"Expected an output file that ends in {', '.join(SUFFIXES)}, got {str(path)!r}."
        )
    if path.is_dir():
        raise ValueError(f"Expected an output file, got the folder {str(path)!r}. Add a file name.")
    if not path.parent.is_dir():
        raise ValueError(
            f"Expected an output file in an existing folder, got {str(path)!r}. "
            f"Make the folder {str(path.parent)!r} first."
        )
    try:
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(
            f"Expected an output file that can be written, got {str(path)!r}: {error.strerror}. "
            "Choose another --output."
        ) from error
    return path


def numbered(path: Path, count: int) -> list[Path]:
    """The files of `count` results: `path` itself for one, else `name-1.mp4`, `name-2.mp4`, ..."""
    if count == 1:
        return [path]
    digits = len(str(count))
    return [path.with_stem(f"{path.stem}-{i:0{digits}d}") for i in range(1, count + 1)]


def as_bytes(frames: Tensor | np.ndarray | Sequence[Image]) -> np.ndarray:
    """Turns frames into uint8 `[F, H, W, 3]`.

    Args:
        frames: float `[F, H, W, 3]` in 0..1 (array or tensor), or a sequence of PIL images.

    Raises:
        ValueError: another shape, no frames, values that are not finite or not in 0..1.
    """
    if isinstance(frames, Sequence):
        if not frames:
            raise ValueError("Expected at least one frame, got none.")
        return np.stack([np.asarray(image.convert("RGB")) for image in frames])
    array = frames if isinstance(frames, np.ndarray) else frames.detach().float().cpu().numpy()
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise ValueError(f"Expected frames of shape [F, H, W, 3], got {list(array.shape)}.")
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"Expected float frames in 0..1, got {array.dtype}.")
    low, high = float(array.min()), float(array.max())
    if not (low >= -_RANGE_SLACK and high <= 1 + _RANGE_SLACK):
        raise ValueError(
            f"Expected finite frames with values in 0..1, got values from {low:g} to {high:g}."
        )
    return (array.clip(0, 1) * 255).round().astype(np.uint8)


def write(
    path: str | Path, frames: Tensor | np.ndarray | Sequence[Image], *, fps: float = 16.0
) -> Path:
    """Writes frames in the format that the suffix of `path` names.

    mp4 is H.264 in 4:2:0 at constant rate factor 18: lossy, so measure quality on the frames, not
    on the file. 4:2:0 needs an even width and height; an odd side gains one repeated row or column
    and a warning says so. gif has 256 colours a frame and whole hundredths of a second. png holds
    one image, or all frames of a video side by side as a contact sheet.

    Args:
        path: a file that ends in .mp4, .gif or .png; an existing one is replaced.
        frames: float `[F, H, W, 3]` in 0..1, or a sequence of PIL images.
        fps: frames per second of mp4 and gif.

    Returns:
        The path.

    Raises:
        ValueError: the path cannot be written, or frames or fps are not as described.
    """
    path = check_output(path)
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"Expected a positive number of frames per second, got {fps}.")
    array = as_bytes(frames)
    match path.suffix.lower():
        case ".mp4":
            _write_mp4(path, array, fps)
        case ".gif":
            _imwrite(path, array, duration=1000 / fps, loop=0)
        case ".png":
            _imwrite(path, contact_sheet(array))
    return path


def contact_sheet(frames: np.ndarray) -> np.ndarray:
    """Lays uint8 `[F, H, W, 3]` frames row by row on one `[H', W', 3]` picture, about square."""
    count, height, width, _ = frames.shape
    columns = math.ceil(math.sqrt(count * height / width))
    columns = min(max(columns, 1), count)
    rows = math.ceil(count / columns)
    blank = np.zeros((rows * columns - count, height, width, 3), np.uint8)
    tiles = np.concatenate([frames, blank]).reshape(rows, columns, height, width, 3)
    return tiles.swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def _write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    odd_height, odd_width = frames.shape[1] % 2, frames.shape[2] % 2
    if odd_height or odd_width:
        logger.warning(
            "mp4 needs an even width and height: %s is written as %dx%d instead of %dx%d, with the "
            "last row or column repeated.",
            path,
            frames.shape[2] + odd_width,
            frames.shape[1] + odd_height,
            frames.shape[2],
            frames.shape[1],
        )
        padding = ((0, 0), (0, odd_height), (0, odd_width), (0, 0))
        frames = np.pad(frames, padding, mode="edge")
    _imwrite(
        path,
        frames,
        plugin="FFMPEG",
        fps=fps,
        codec="libx264",
        quality=None,  # else imageio adds its own rate setting beside ours
        macro_block_size=1,  # else imageio rescales to multiples of 16
        output_params=["-crf", "18"],
    )


def _imwrite(path: Path, array: np.ndarray, **options: Any) -> None:
    from imageio import v3 as iio

    iio.imwrite(path, array, **options)
