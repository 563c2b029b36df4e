"""Builds the set of captioned still sprites from published packages.

    python scripts/data/build_images.py --output data

One 3-D render for each design, in the skin tone that the animated set shows. Cached and resumable
like build_clips.py.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a bare checkout

from scripts.data import packages
from scripts.data.cache import EncodedCache
from scripts.data.names import catalogue
from scripts.data.pixels import Encoding
from scripts.data.shards import Index, report, write_set

ENCODING = Encoding(size=128, quality=66, speed=6)


def build(output: Path, encoding: Encoding, workers: int) -> Index:
    """Fetches, encodes what the cache lacks, and writes shards and index into `output`."""
    cache = output / "cache"
    table = packages.read(packages.fetch(packages.NAMES, cache), "data/openmoji.json")
    names = catalogue(table)
    tarball = packages.fetch(packages.RENDERS, cache)
    renders = {
        filename.removesuffix(".webp"): content
        for filename, content in packages.members(tarball, ".webp")
    }
    chosen = names.choose(renders)
    encoded = EncodedCache(cache / f"renders-{encoding}", encoding)
    missing = [(stem, renders[stem]) for stem in chosen.values() if not encoded.has(stem)]
    with get_context("spawn").Pool(workers) as pool:
        work = pool.imap_unordered(partial(encoded.add, frames=1), missing, chunksize=8)
        for _ in tqdm(work, total=len(missing), desc="encoding", unit="picture", mininterval=1):
            pass
    source = packages.RENDERS.name
    pictures = tuple(encoded.picture(stem, code, source) for code, stem in chosen.items())
    index = Index(
        kind="images",
        size=encoding.size,
        frames=1,
        encoding=str(encoding),
        sources=tuple(package.record() for package in (packages.RENDERS, packages.NAMES)),
        shards=(),
        designs={code: names.designs[code] for code in chosen},
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
