"""Builds the set of captioned still sprites from published packages.

    python scripts/data/build_images.py --output data

One 3-D render for each design of some subjects, in the skin tone that the animated set shows: the
image model has half the weights of the video model, and draws a few hundred things well or a
thousand badly. Cached and resumable like build_clips.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a bare checkout

from scripts.data import packages
from scripts.data.cache import EncodedCache
from scripts.data.names import Catalogue, catalogue
from scripts.data.pixels import Encoding
from scripts.data.shards import Index, report, write_set

ENCODING = Encoding(size=128, quality=66, speed=6)

#: How "group/subgroup" of the designs begins that are shown: living things, food, weather, aircraft
#: and the simplest faces.
SUBJECTS = (
    "animals-nature/",
    "food-drink/",
    "travel-places/sky-weather",
    "travel-places/transport-air",
    "smileys-emotion/cat-face",
    "smileys-emotion/face-affection",
    "smileys-emotion/face-costume",
    "smileys-emotion/face-glasses",
    "smileys-emotion/face-hat",
    "smileys-emotion/face-smiling",
    "smileys-emotion/heart",
    "smileys-emotion/monkey-face",
)


def build(
    output: Path, encoding: Encoding, workers: int, subjects: Sequence[str] = SUBJECTS
) -> Index:
    """Fetches, encodes what the cache lacks, and writes shards and index into `output`.

    Args:
        output: Folder of the sets and their cache.
        encoding: Of the pictures.
        workers: Processes that encode.
        subjects: How "group/subgroup" of the designs to show begins; none shows all.

    Raises:
        ValueError: no design is of a subject.
    """
    cache = output / "cache"
    table = packages.read(packages.fetch(packages.NAMES, cache), "data/openmoji.json")
    names = catalogue(table)
    tarball = packages.fetch(packages.RENDERS, cache)
    renders = {
        filename.removesuffix(".webp"): content
        for filename, content in packages.members(tarball, ".webp")
    }
    chosen = _of_subjects(names, names.choose(renders), subjects)
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


def _of_subjects(
    names: Catalogue, chosen: dict[str, str], subjects: Sequence[str]
) -> dict[str, str]:
    paths = {code: f"{names.designs[code].group}/{names.designs[code].subgroup}" for code in chosen}
    for subject in subjects:
        if not any(path.startswith(subject) for path in paths.values()):
            raise ValueError(
                f"Expected designs of every subject, got none of {subject!r}. Name the beginning "
                f"of one of: {', '.join(sorted(set(paths.values())))}."
            )
    shown = tuple(subjects) or ("",)
    return {code: stem for code, stem in chosen.items() if paths[code].startswith(shown)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("data"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--subjects", nargs="*", default=SUBJECTS, help="group/subgroup or how it begins; none: all"
    )
    arguments = parser.parse_args()
    try:
        index = build(arguments.output, ENCODING, arguments.workers, arguments.subjects)
    except (RuntimeError, ValueError) as failure:
        sys.exit(str(failure))
    print(report(index))


if __name__ == "__main__":
    main()
