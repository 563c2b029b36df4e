"""Builds the set of captioned animated sprites from published packages.

    python scripts/data/build_clips.py --output data

One clip for each design (skin tones are merged, the tone is chosen by hash), 24 frames over its
loop, cropped and resized, AVIF with alpha. Tarballs and encoded clips are cached under
`<output>/cache`, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a bare checkout

from scripts.data import packages
from scripts.data.cache import EncodedCache
from scripts.data.names import Catalogue, catalogue
from scripts.data.pixels import Encoding, frame_count
from scripts.data.shards import Index, report, write_set

FRAMES = 24
FEWEST_FRAMES = 16  # shorter files are stills or broken loops
ENCODING = Encoding(size=128, quality=62, speed=4)


@dataclass(frozen=True)
class Source:
    """An animation chosen for a design."""

    name: str
    design: str
    package: str


def choose(counts: Mapping[str, int], origin: Mapping[str, str], names: Catalogue) -> list[Source]:
    """One animation for each design, sorted by code.

    Args:
        counts: Frames by file stem, "1f44b-1f3fb".
        origin: Package by file stem.
        names: Designs; files of flags and unknown code points are dropped.
    """
    moving = (stem for stem, count in counts.items() if count >= FEWEST_FRAMES)
    return [Source(stem, code, origin[stem]) for code, stem in names.choose(moving).items()]


def build(output: Path, encoding: Encoding, workers: int) -> Index:
    """Fetches, encodes what the cache lacks, and writes shards and index into `output`."""
    cache = output / "cache"
    table = packages.read(packages.fetch(packages.NAMES, cache), "data/openmoji.json")
    names = catalogue(table)
    tarballs = {package.name: packages.fetch(package, cache) for package in packages.CLIPS}
    counts: dict[str, int] = {}
    origin: dict[str, str] = {}
    for package, stem, content in tqdm(
        _animations(tarballs), desc="inspecting", unit="file", mininterval=1
    ):
        counts[stem], origin[stem] = frame_count(content), package
    sources = {source.name: source for source in choose(counts, origin, names)}
    encoded = EncodedCache(cache / f"clips-{encoding}", encoding)
    missing = {name for name in sources if not encoded.has(name)}
    jobs = ((stem, content) for _, stem, content in _animations(tarballs) if stem in missing)
    with get_context("spawn").Pool(workers) as pool:
        work = partial(encoded.add, frames=FRAMES)
        bar = tqdm(total=len(missing), desc="encoding", unit="clip", mininterval=1)
        for _ in pool.imap_unordered(work, jobs):
            bar.update()
        bar.close()
    pictures = [
        encoded.picture(source.name, source.design, source.package) for source in sources.values()
    ]
    index = Index(
        kind="clips",
        size=encoding.size,
        frames=FRAMES,
        encoding=str(encoding),
        sources=tuple(p.record() for p in (*packages.CLIPS, packages.NAMES)),
        shards=(),
        designs={source.design: names.designs[source.design] for source in sources.values()},
        pictures=tuple(pictures),
    )
    return write_set(output, index, {p.file: encoded.path(p.file) for p in pictures})


def _animations(tarballs: Mapping[str, Path]) -> Iterator[tuple[str, str, bytes]]:
    for package, tarball in tarballs.items():
        for filename, content in packages.members(tarball, ".webp"):
            yield package, filename.removesuffix(".webp"), content


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
