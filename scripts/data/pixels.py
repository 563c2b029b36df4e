"""From package files to small premultiplied RGBA frames, and to AVIF and back.

Frames are uint8 arrays [frames, size, size, 4] with colours premultiplied by alpha: they can be
averaged and resampled without halos. The AVIF files hold premultiplied colours too, though nothing
in the file says so: a viewer shows dark edges. AVIF codes differences between frames, which makes a
clip four times smaller than animated WebP does; Pillow 11.3 and newer read it.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image

Frames = NDArray[np.uint8]
# A thread for every core and file makes small files slow; whole files are decoded in parallel.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

VISIBLE = 8  # alpha from which a pixel counts as content
MARGIN = 1.02  # side of the stored square over that of the content


@dataclass(frozen=True)
class Encoding:
    """How frames are stored: side in pixels, AVIF quality 0-100 and effort (0 slowest, 10)."""

    size: int
    quality: int
    speed: int

    def __str__(self) -> str:
        return f"avif-{self.size}px-q{self.quality}-s{self.speed}"


def frame_count(content: bytes) -> int:
    """Number of frames of an image file."""
    with Image.open(io.BytesIO(content)) as image:
        return getattr(image, "n_frames", 1)


def load_frames(content: bytes, frames: int, size: int) -> Frames:
    """Reads an image file and resamples it to `frames` over its loop, cropped to `size` pixels.

    Frame i shows the source at i / frames of the loop (the nearest source frame, never a blend), so
    the last one is followed by the first as in the source. All frames share one square box around
    everything that is ever visible.

    Raises:
        ValueError: nothing is visible in any frame.
    """
    with Image.open(io.BytesIO(content)) as image:
        count = getattr(image, "n_frames", 1)
        wanted = [i * count // frames for i in range(frames)]
        shown: dict[int, Image.Image] = {}
        for i in range(count):  # animated files decode in order only
            image.seek(i)
            if i in wanted:
                shown[i] = _premultiplied(image)
    pictures = [shown[i] for i in wanted]
    box = content_box(np.stack([np.asarray(picture)[..., 3] for picture in pictures]))
    return np.stack([_crop(picture, box, size) for picture in pictures])


def content_box(alpha: Frames) -> tuple[float, float, float]:
    """(left, top, side) of the square around what is visible in any frame of alpha [F, H, W]."""
    rows, columns = np.nonzero(alpha.max(0) >= VISIBLE)
    if not rows.size:
        raise ValueError("Expected a picture with visible pixels, got none. Leave this file out.")
    left, right = int(columns.min()), int(columns.max()) + 1
    top, bottom = int(rows.min()), int(rows.max()) + 1
    side = MARGIN * max(right - left, bottom - top)
    return (left + right - side) / 2, (top + bottom - side) / 2, side


def encode(frames: Frames, encoding: Encoding) -> bytes:
    """AVIF file of premultiplied frames, full colour resolution, looping."""
    images = [Image.fromarray(frame) for frame in frames]
    file = io.BytesIO()
    images[0].save(
        file,
        "AVIF",
        save_all=True,
        append_images=images[1:],
        quality=encoding.quality,
        speed=encoding.speed,
        subsampling="4:4:4",
        max_threads=1,
        duration=125,
    )
    return file.getvalue()


def decode(content: bytes) -> Frames:
    """The frames of `encode`'s file, uint8 [F, size, size, 4], premultiplied.

    Raises:
        RuntimeError: this Pillow was built without AVIF.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            count = getattr(image, "n_frames", 1)
            frames = []
            for i in range(count):
                image.seek(i)
                frames.append(np.asarray(image.convert("RGBA")))
    except Image.UnidentifiedImageError:
        raise RuntimeError(
            "Expected a Pillow that reads AVIF, or an intact file; got an unreadable picture. "
            "Install pillow>=11.3 and check with `python -m PIL`."
        ) from None
    stacked = np.stack(frames)
    return np.minimum(stacked, np.maximum(stacked[..., 3:], 0))  # lossy coding can pass the alpha


def psnr(a: Frames, b: Frames) -> float:
    """Peak signal-to-noise ratio in dB over all four channels; 99 when equal."""
    error = float(np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2))
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def own_motion(frames: Frames) -> str:
    """What the clip does as a whole: "bobbing", "swaying", "pulsing", or "" for nothing clear.

    From centre and area of the alpha channel: a motion is named when it is large (over 4 % of the
    side, or 12 % of the area) and twice as large as the others.
    """
    alpha = frames[..., 3].astype(np.float64) / 255
    mass = alpha.sum((1, 2)) + 1e-6
    places = np.arange(frames.shape[1]) / frames.shape[1]
    strengths = {
        "bobbing": np.ptp((alpha.sum(2) * places).sum(1) / mass) / 0.04,
        "swaying": np.ptp((alpha.sum(1) * places).sum(1) / mass) / 0.04,
        "pulsing": np.ptp(mass) / mass.mean() / 0.12,
    }
    first, second = sorted(strengths, key=strengths.__getitem__, reverse=True)[:2]
    clear = strengths[first] > 1 and strengths[first] > 2 * strengths[second]
    return first if clear else ""


def _premultiplied(image: Image.Image) -> Image.Image:
    return image.convert("RGBA").convert("RGBa")


def _crop(picture: Image.Image, box: tuple[float, float, float], size: int) -> Frames:
    left, top, side = box
    # Pad first: resize() reads inside the picture only, and the square may reach past its edge.
    pad = int(max(0, -left, -top, left + side - picture.width, top + side - picture.height)) + 2
    padded = Image.new("RGBA", (picture.width + 2 * pad, picture.height + 2 * pad))
    padded.paste(Image.frombytes("RGBA", picture.size, picture.tobytes()), (pad, pad))
    region = (left + pad, top + pad, left + pad + side, top + pad + side)
    planes = [
        plane.resize((size, size), Image.Resampling.LANCZOS, box=region) for plane in padded.split()
    ]
    pixels = np.stack([np.asarray(plane) for plane in planes], axis=-1)
    return np.minimum(pixels, pixels[..., 3:])
