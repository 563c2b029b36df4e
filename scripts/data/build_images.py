"""Builds the set of captioned still sprites from published packages.

    python scripts/data/build_images.py --output data

One picture for each design in each drawing style: 3-D renders, and icon sets that are licensed MIT
or Apache-2.0, drawn with resvg. Icons without a known design, and pictures that look the same as
one of an earlier style, are left out. Cached and resumable like build_clips.py. Needs resvg-py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a bare checkout

from scripts.data import packages
from scripts.data.cache import EncodedCache
from scripts.data.icons import Drawing, code_points, icons, rasterise, read_icon_set, renders
from scripts.data.names import Design, catalogue
from scripts.data.pixels import Encoding, load_frames
from scripts.data.shards import Index, report, write_set

ICON_SETS = ("fluent-emoji", "fluent-emoji-flat", "noto", "noto-v1", "fxemoji")
ENCODING = Encoding(size=128, quality=66, speed=6)


def draw(drawing: Drawing, encoded: EncodedCache) -> None:
    """Draws one picture into the cache; one that comes out empty is noted as such."""
    size = encoded.encoding.size
    content = rasterise(drawing.content, 2 * size) if drawing.svg else drawing.content
    try:
        frames = load_frames(content, 1, size)
    except ValueError:  # icons made of text come out empty without fonts
        encoded.reject(drawing.name)
    else:
        encoded.store(drawing.name, frames)


def without_repeats(drawings: Iterable[Drawing], encoded: EncodedCache) -> list[Drawing]:
    """Leaves out empty pictures, and those that look like an earlier one of the same design."""
    looks: set[tuple[str, str]] = set()
    kept = []
    for drawing in drawings:
        look = (drawing.design, encoded.look(drawing.name))
        if look[1] and look not in looks:
            looks.add(look)
            kept.append(drawing)
    return kept


def collect(cache: Path) -> tuple[list[Drawing], dict[str, Design]]:
    """(all drawings in order of style, designs by code) of the fetched packages."""
    table = packages.read(packages.fetch(packages.NAMES, cache), "data/openmoji.json")
    names = catalogue(table)
    tarball = packages.fetch(packages.ICONS, cache)
    sets = [read_icon_set(tarball, prefix) for prefix in ICON_SETS]
    aliases = code_points(sets, names)
    drawings = renders(packages.fetch(packages.RENDERS, cache), names)
    for icon_set in sets:
        drawings += icons(icon_set, names, aliases)
    return drawings, dict(names.designs)


def build(output: Path, encoding: Encoding, workers: int) -> Index:
    """Fetches, draws what the cache lacks, and writes shards and index into `output`."""
    drawings, designs = collect(output / "cache")
    encoded = EncodedCache(output / "cache" / f"images-{encoding}", encoding)
    missing = [drawing for drawing in drawings if not encoded.has(drawing.name)]
    with get_context("spawn").Pool(workers) as pool:
        work = pool.imap_unordered(partial(draw, encoded=encoded), missing, chunksize=8)
        for _ in tqdm(work, total=len(missing), desc="drawing", unit="picture", mininterval=1):
            pass
    kept = without_repeats(drawings, encoded)
    pictures = tuple(encoded.picture(d.name, d.design, d.source) for d in kept)
    used = (packages.RENDERS, packages.ICONS, packages.NAMES)
    index = Index(
        kind="images",
        size=encoding.size,
        frames=1,
        encoding=str(encoding),
        sources=tuple(package.record() for package in used),
        shards=(),
        designs={picture.design: designs[picture.design] for picture in pictures},
        pictures=pictures,
    )
    return write_set(output, index, {p.file: encoded.path(p.file) for p in pictures})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("data"))
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    try:
        index = build(arguments.output, ENCODING, arguments.workers)
    except RuntimeError as failure:
        sys.exit(str(failure))
    print(report(index))


if __name__ == "__main__":
    main()
