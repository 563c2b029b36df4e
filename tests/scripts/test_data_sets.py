"""Pixels, shards, sprites, packages and the builders, on tiny synthetic pictures."""

import base64
import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, features

from scripts.data import build_clips, build_images, packages
from scripts.data.cache import EncodedCache
from scripts.data.names import catalogue
from scripts.data.packages import Package, fetch, verify
from scripts.data.pixels import Encoding, content_box, decode, encode, load_frames, own_motion, psnr
from scripts.data.shards import Index, Picture, read_index, write_set
from scripts.data.sprites import Sprites, load_sprites

pytestmark = pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
SMALL = Encoding(size=32, quality=80, speed=9)
NAMES = (("1F404", "cow", "animals-nature"), ("1F34E", "red apple", "food-drink"))


def table() -> bytes:
    rows = [
        {
            "hexcode": code,
            "annotation": name,
            "group": group,
            "subgroups": "",
            "tags": "one, two",
            "skintone_base_hexcode": "",
        }
        for code, name, group in NAMES
    ]
    return json.dumps(rows).encode()


def moving_square(frames: int, step: int = 2) -> bytes:
    """A red square that moves down by `step` pixels a frame, on a transparent ground."""
    pictures = []
    for i in range(frames):
        pixels = np.zeros((64, 64, 4), np.uint8)
        pixels[4 + step * i : 16 + step * i, 20:32] = (255, 0, 0, 255)
        pictures.append(Image.fromarray(pixels))
    file = io.BytesIO()
    pictures[0].save(
        file, "WEBP", save_all=True, append_images=pictures[1:], lossless=True, exact=True
    )
    return file.getvalue()


def tarball(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    return path.stat().st_size, digest


def packed(cache, name, files) -> Package:
    """A package whose tarball is in the cache already."""
    cache.mkdir(parents=True, exist_ok=True)
    draft = Package(name, "1.0.0", 0, "", "MIT")
    size, digest = tarball(cache / draft.filename, files)
    return Package(name, "1.0.0", size, digest, "MIT")


def test_frames_are_spread_over_the_loop_and_cropped_to_one_box():
    frames = load_frames(moving_square(16), 8, 32)
    assert frames.shape == (8, 32, 32, 4)
    tops = [int(np.nonzero(frame[..., 3].max(1) > 128)[0][0]) for frame in frames]
    assert tops == sorted(tops)
    assert tops[0] <= 1  # the box starts where the highest frame does
    steps = np.diff(tops)
    assert steps.max() - steps.min() <= 1
    assert (frames[..., :3] <= frames[..., 3:]).all()


def test_the_box_is_a_square_around_all_frames():
    alpha = np.zeros((2, 40, 40), np.uint8)
    alpha[0, 10:12, 10:12] = 255
    alpha[1, 28:30, 10:12] = 255
    left, top, side = content_box(alpha)
    assert side == pytest.approx(20 * 1.02)
    assert (left + side / 2, top + side / 2) == pytest.approx((11, 20))


def test_an_invisible_picture_is_refused():
    with pytest.raises(ValueError, match="visible pixels"):
        content_box(np.zeros((1, 8, 8), np.uint8))


def test_stored_frames_come_back():
    frames = load_frames(moving_square(16), 8, 32)
    back = decode(encode(frames, SMALL))
    assert back.shape == frames.shape
    assert psnr(frames, back) > 30
    assert (back[..., :3] <= back[..., 3:]).all()


def test_a_moving_clip_is_said_to_move():
    assert own_motion(load_frames(moving_square(16, step=1), 16, 32)) == "bobbing"
    assert own_motion(load_frames(moving_square(16, step=0), 16, 32)) == ""


def test_a_changed_tarball_is_refused(tmp_path):
    package = packed(tmp_path, "some", {"a.txt": b"a"})
    path = tmp_path / package.filename
    assert fetch(package, tmp_path) == path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match="sha512"):
        verify(package, path)
    path.write_bytes(content[:-1])
    with pytest.raises(RuntimeError, match="bytes"):
        fetch(package, tmp_path)


@pytest.fixture
def clip_packages(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    files = {
        "assets/1f404.webp": moving_square(16),
        "assets/1f34e.webp": moving_square(17, step=1),
        "assets/1f409.webp": moving_square(16),
    }
    monkeypatch.setattr(packages, "CLIPS", (packed(cache, "clips", files),))
    monkeypatch.setattr(packages, "NAMES", packed(cache, "names", {"data/openmoji.json": table()}))
    return tmp_path


def build_in_process(monkeypatch):
    """Replaces the process pool: the tests need no second interpreter."""

    class Pool:
        def __init__(self, workers):
            self.imap_unordered = lambda work, jobs, chunksize=1: map(work, jobs)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    class Context:
        Pool = staticmethod(lambda workers: Pool(workers))

    for builder in (build_clips, build_images):
        monkeypatch.setattr(builder, "get_context", lambda method: Context)


def test_clips_are_built_twice_alike_and_from_the_cache(clip_packages, monkeypatch):
    build_in_process(monkeypatch)
    index = build_clips.build(clip_packages, SMALL, 1)
    assert {index.designs[p.design].name for p in index.pictures} == {"cow", "red apple"}
    first = {path.name: path.read_bytes() for path in (clip_packages / "clips").iterdir()}

    def fail(*arguments):
        raise AssertionError("encoded again")

    monkeypatch.setattr(EncodedCache, "store", fail)
    build_clips.build(clip_packages, SMALL, 1)
    assert first == {path.name: path.read_bytes() for path in (clip_packages / "clips").iterdir()}


def test_sprites_load_what_was_built(clip_packages, monkeypatch):
    build_in_process(monkeypatch)
    build_clips.build(clip_packages, SMALL, 1)
    sprites = load_sprites(clip_packages, "clips", workers=1)
    assert sprites.pixels.shape == (2, 24, 4, 32, 32)
    assert sorted(sprites.names) == ["cow", "red apple"]
    cow = sprites.names.index("cow")
    expected = load_frames(moving_square(16), 24, 32).transpose(0, 3, 1, 2)
    assert psnr(sprites.pixels[cow].numpy(), expected) > 30
    assert sprites.held_out.all()  # one name a group: the share is rounded up
    assert {"a", "cow", "one", "two"} <= set(sprites.words)


def test_images_hold_one_render_of_each_design_in_the_tone_of_the_clip(tmp_path, monkeypatch):
    rows = [
        {
            "hexcode": code,
            "annotation": "waving hand",
            "group": "people-body",
            "subgroups": "",
            "tags": "",
            "skintone_base_hexcode": "1F44B",
        }
        for code in ("1F44B", "1F44B-1F3FB", "1F44B-1F3FF")
    ]
    stems = ("1f44b", "1f44b-1f3fb", "1f44b-1f3ff", "1f404", "1f409")
    cache = tmp_path / "cache"
    names = json.dumps(json.loads(table()) + rows).encode()
    monkeypatch.setattr(packages, "NAMES", packed(cache, "names", {"data/openmoji.json": names}))
    for kind, frames in (("RENDERS", 1), ("CLIPS", 16)):
        files = {f"assets/{stem}.webp": moving_square(frames) for stem in stems}
        package = packed(cache, kind.lower(), files)
        monkeypatch.setattr(packages, kind, package if kind == "RENDERS" else (package,))
    build_in_process(monkeypatch)
    stills = build_images.build(tmp_path, SMALL, 1, subjects=())
    clips = build_clips.build(tmp_path, SMALL, 1)
    assert [stills.designs[p.design].name for p in stills.pictures] == ["cow", "waving hand"]
    assert {p.source for p in stills.pictures} == {"renders"}
    assert [p.file for p in stills.pictures] == [p.file for p in clips.pictures]
    assert load_sprites(tmp_path, "images").pixels.shape == (2, 1, 4, 32, 32)
    animals = build_images.build(tmp_path, SMALL, 1, subjects=("animals-nature/",))
    assert [animals.designs[p.design].name for p in animals.pictures] == ["cow"]
    with pytest.raises(
        ValueError, match=r"none of 'mammals'\. Name the .* of: animals-nature/, peo"
    ):
        build_images.build(tmp_path, SMALL, 1, subjects=("people-body/", "mammals"))


def small_set(folder) -> Index:
    cache = EncodedCache(folder / "cache", SMALL)
    cache.add(("1f404", moving_square(16)), 8)
    designs = catalogue(table()).designs
    picture = Picture("1f404.avif", "1F404", "test", "", 40.0)
    index = Index("clips", 32, 8, str(SMALL), (), (), {"1F404": designs["1F404"]}, (picture,))
    return write_set(folder, index, {"1f404.avif": cache.path("1f404.avif")})


def test_an_index_reads_back_as_written(tmp_path):
    written = small_set(tmp_path)
    assert read_index(tmp_path, "clips") == written


def test_bad_sets_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"build_clips\.py"):
        load_sprites(tmp_path, "clips")
    with pytest.raises(ValueError, match="kind"):
        load_sprites(tmp_path, "movies")
    small_set(tmp_path)
    shard = tmp_path / "clips" / "clips-00.zip"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"clips-00\.zip"):
        load_sprites(tmp_path, "clips")
    path = tmp_path / "clips" / "index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "format": 99}))
    with pytest.raises(ValueError, match="format"):
        load_sprites(tmp_path, "clips")


def test_sprites_check_their_parts():
    with pytest.raises(ValueError, match="uint8"):
        Sprites(torch.zeros(1, 1, 4, 8, 8), (), torch.zeros(1, dtype=torch.long), ("",))
    pixels = torch.zeros(2, 1, 4, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="for each of 2"):
        Sprites(pixels, (), torch.zeros(1, dtype=torch.long), ("",))
