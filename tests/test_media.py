"""Files that media.py writes are read back with imageio and compared with the frames."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from imageio import v3 as iio
from PIL import Image

from dit_sparse import media


def gradient(frames: int, height: int, width: int) -> np.ndarray:
    """A smooth moving picture, float32 [F, H, W, 3] in 0..1, that survives lossy coding."""
    f, y, x = np.meshgrid(
        np.linspace(0, 1, frames),
        np.linspace(0, 1, height),
        np.linspace(0, 1, width),
        indexing="ij",
    )
    return np.stack([f, y, x], -1).astype(np.float32)


@pytest.mark.parametrize("kind", ["array", "tensor", "pil"])
def test_mp4_decodes_to_the_frames(tmp_path: Path, kind: str) -> None:
    frames = gradient(7, 34, 48)  # not multiples of 16: imageio must not rescale
    given = {
        "array": lambda: frames,
        "tensor": lambda: torch.from_numpy(frames).bfloat16(),
        "pil": lambda: [Image.fromarray(f) for f in media.as_bytes(frames)],
    }[kind]()
    path = media.write(tmp_path / "clip.mp4", given, fps=8)
    decoded = iio.imread(path)
    assert decoded.shape == (7, 34, 48, 3)
    assert iio.immeta(path)["fps"] == 8
    assert np.abs(decoded / 255 - frames).mean() < 0.03


def test_odd_mp4_gains_a_row_and_a_column_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "dit_sparse"):
        media.write(tmp_path / "clip.mp4", gradient(3, 33, 47))
    decoded = iio.imread(tmp_path / "clip.mp4").astype(int)
    assert decoded.shape == (3, 34, 48, 3)
    assert np.abs(decoded[:, -1] - decoded[:, -2]).mean() < 8
    assert np.abs(decoded[:, :, -1] - decoded[:, :, -2]).mean() < 8
    assert "48x34 instead of 47x33" in caplog.text


def test_even_mp4_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    media.write(tmp_path / "clip.mp4", gradient(3, 32, 48))
    assert not caplog.records


def test_gif_decodes_to_the_frames(tmp_path: Path) -> None:
    frames = gradient(5, 16, 24)
    decoded = iio.imread(media.write(tmp_path / "clip.gif", frames, fps=10))
    assert decoded.shape == (5, 16, 24, 3)
    assert iio.immeta(tmp_path / "clip.gif")["duration"] == pytest.approx(100)
    assert np.abs(decoded / 255 - frames).mean() < 0.05


def test_png_is_lossless(tmp_path: Path) -> None:
    frames = gradient(1, 17, 23)
    decoded = iio.imread(media.write(tmp_path / "image.png", frames))
    np.testing.assert_array_equal(decoded, (frames[0] * 255).round().astype(np.uint8))


def test_png_of_a_video_is_a_contact_sheet_in_reading_order(tmp_path: Path) -> None:
    frames = gradient(5, 8, 8)
    sheet = iio.imread(media.write(tmp_path / "sheet.png", frames))
    assert sheet.shape == (16, 24, 3)
    expected = media.as_bytes(frames)
    np.testing.assert_array_equal(sheet[:8, 16:], expected[2])
    np.testing.assert_array_equal(sheet[8:, 8:16], expected[4])
    assert not sheet[8:, 16:].any()


@pytest.mark.parametrize(
    ("frames", "sentence"),
    [
        (np.zeros((4, 8, 8), np.float32), r"shape \[F, H, W, 3\], got \[4, 8, 8\]"),
        (np.zeros((0, 8, 8, 3), np.float32), r"got \[0, 8, 8, 3\]"),
        (np.zeros((1, 8, 8, 3), np.uint8), "float frames in 0..1, got uint8"),
        (np.full((1, 8, 8, 3), 255.0), "values in 0..1, got values from 255 to 255"),
        (np.full((1, 8, 8, 3), np.nan), "finite"),
        ([], "at least one frame"),
    ],
)
def test_wrong_frames_are_refused(tmp_path: Path, frames: np.ndarray, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        media.write(tmp_path / "x.png", frames)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("fps", [0, -1, math.nan, math.inf])
def test_wrong_fps_is_refused(tmp_path: Path, fps: float) -> None:
    with pytest.raises(ValueError, match="positive number of frames per second"):
        media.write(tmp_path / "x.mp4", gradient(1, 8, 8), fps=fps)


def test_check_output_refuses_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    for bad, sentence in {
        "clip.avi": "ends in .mp4, .gif, .png",
        "clip": "ends in",
        "missing/clip.mp4": "existing folder",
        "file/clip.mp4": "existing folder",
        "folder.mp4": "got the folder",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            media.check_output(tmp_path / bad)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write")
def test_check_output_refuses_a_read_only_folder() -> None:
    with pytest.raises(ValueError, match="can be written"):
        media.check_output("/proc/self/clip.mp4")


def test_check_output_leaves_nothing_behind(tmp_path: Path) -> None:
    kept = tmp_path / "kept.gif"
    kept.write_bytes(b"old")
    media.check_output(kept)
    media.check_output(tmp_path / "NEW.MP4")
    assert [p.name for p in tmp_path.iterdir()] == ["kept.gif"]
    assert kept.read_bytes() == b"old"


def test_numbered() -> None:
    assert media.numbered(Path("a/b.mp4"), 1) == [Path("a/b.mp4")]
    names = [p.name for p in media.numbered(Path("a/b.mp4"), 10)]
    assert names[0] == "b-01.mp4"
    assert names[-1] == "b-10.mp4"
