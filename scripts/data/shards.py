"""The stored form of a data set: an index in JSON and a few zip files of AVIF pictures."""

from __future__ import annotations

import hashlib
import json
import statistics
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.data.names import Design

SHARD_BYTES = 9_000_000
FORMAT = 1


@dataclass(frozen=True)
class Picture:
    """One stored picture or clip.

    Attributes:
        file: Its name in the shard, unique in the set.
        design: Code of its design.
        source: Package that it comes from.
        motion: What a clip does by itself, see `pixels.own_motion`; "" for stills.
        psnr: dB of the stored frames against the resampled source.
    """

    file: str
    design: str
    source: str
    motion: str
    psnr: float


@dataclass(frozen=True)
class Index:
    """What a set contains; `shards` are the files that hold it, in order."""

    kind: str
    size: int
    frames: int
    encoding: str
    sources: tuple[Mapping[str, str], ...]
    shards: tuple[Mapping[str, Any], ...]
    designs: Mapping[str, Design]
    pictures: tuple[Picture, ...]


def index_path(folder: Path, kind: str) -> Path:
    """Where the index of the set `kind` ("clips" or "images") lies."""
    return folder / kind / "index.json"


def write_set(folder: Path, index: Index, files: Mapping[str, Path]) -> Index:
    """Packs `files` (by picture name) into shards in `folder/kind`, and writes the index there.

    A shard has at most `SHARD_BYTES`. The bytes depend on the pictures alone: fixed order, fixed
    dates, no compression of AVIF data. The index is written last and replaced in one step; it is
    what makes a set complete.
    """
    path = index_path(folder, index.kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    for stale in path.parent.glob("*.zip"):
        stale.unlink()
    shards = []
    for number, names in enumerate(_parts([(p.file, files[p.file]) for p in index.pictures])):
        shard = path.parent / f"{index.kind}-{number:02d}.zip"
        with zipfile.ZipFile(shard, "w", zipfile.ZIP_STORED) as archive:
            for name in names:
                entry = zipfile.ZipInfo(name, date_time=(2000, 1, 1, 0, 0, 0))
                archive.writestr(entry, files[name].read_bytes())
        content = shard.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        shards.append({"file": shard.name, "bytes": len(content), "sha256": digest})
    written = Index(**{**_fields(index), "shards": tuple(shards)})
    draft = path.with_suffix(".part")
    draft.write_text(_dump(written), encoding="utf-8")
    draft.replace(path)
    return written


def read_index(folder: Path, kind: str) -> Index:
    """Reads and checks the index of a set, and that its shards are there in full length.

    Raises:
        FileNotFoundError: no index; the sentence names the builder.
        ValueError: another format, or a shard is missing or has another length.
    """
    path = index_path(folder, kind)
    if not path.exists():
        raise FileNotFoundError(
            f"Expected the index {path}, got no such file. "
            f"Build the set with `python scripts/data/build_{kind}.py`."
        )
    raw = json.loads(path.read_text(encoding="utf-8"))
    if raw.get("format") != FORMAT:
        raise ValueError(
            f"Expected {path.name} in format {FORMAT}, got {raw.get('format')}. "
            f"Build the set again."
        )
    del raw["format"]
    for shard in raw["shards"]:
        file = path.parent / shard["file"]
        got = file.stat().st_size if file.exists() else 0
        if got != shard["bytes"]:
            raise ValueError(
                f"Expected {file.name} with {shard['bytes']:,} bytes, got {got:,}. "
                f"Copy it again or build the set with `python scripts/data/build_{kind}.py`."
            )
    raw["designs"] = {
        code: Design(**{**design, "tags": tuple(design["tags"])})
        for code, design in raw["designs"].items()
    }
    raw["pictures"] = tuple(Picture(**picture) for picture in raw["pictures"])
    return Index(**{**raw, "sources": tuple(raw["sources"]), "shards": tuple(raw["shards"])})


def read_files(folder: Path, index: Index) -> Iterator[tuple[str, bytes]]:
    """(picture name, AVIF file) of a whole set in the index's order."""
    for shard in index.shards:
        with zipfile.ZipFile(folder / index.kind / shard["file"]) as archive:
            for name in archive.namelist():
                yield name, archive.read(name)


def report(index: Index) -> str:
    """Counts by group, bytes and PSNR of a finished set."""
    groups = Counter(index.designs[p.design].group for p in index.pictures)
    held = Counter(
        index.designs[p.design].group for p in index.pictures if index.designs[p.design].held_out
    )
    lines = [f"{len(index.pictures)} pictures of {len(index.designs)} designs, {index.encoding}"]
    lines += [f"  {group}: {count}, held out {held[group]}" for group, count in groups.items()]
    lines += [f"  {shard['file']}: {shard['bytes']:,} bytes" for shard in index.shards]
    lines.append(f"  in all {sum(shard['bytes'] for shard in index.shards):,} bytes")
    values = [picture.psnr for picture in index.pictures]
    lines.append(f"  PSNR mean {statistics.mean(values):.1f} dB, lowest {min(values):.1f} dB")
    return "\n".join(lines)


def _parts(files: Sequence[tuple[str, Path]]) -> Iterator[list[str]]:
    names: list[str] = []
    total = 0
    for name, path in files:
        size = path.stat().st_size + 2 * len(name) + 150  # zip headers of one stored file
        if names and total + size > SHARD_BYTES:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    if names:
        yield names


def _fields(index: Index) -> dict[str, Any]:
    return {name: getattr(index, name) for name in index.__dataclass_fields__}


def _dump(index: Index) -> str:
    return json.dumps({"format": FORMAT, **asdict(index)}, separators=(",", ":"), sort_keys=True)
