"""Encoded pictures on disk, so that an interrupted build goes on where it stopped."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from scripts.data.pixels import (
    Encoding,
    Frames,
    decode,
    encode,
    load_frames,
    own_motion,
    psnr,
)
from scripts.data.shards import Picture


@dataclass(frozen=True)
class EncodedCache:
    """A folder with `<name>.avif` and `<name>.json` for each picture, of one encoding."""

    folder: Path
    encoding: Encoding

    def path(self, file: str) -> Path:
        """Where the picture with the file name `file` lies."""
        return self.folder / file

    def has(self, name: str) -> bool:
        """Whether the picture is complete; its facts are written last."""
        return (self.folder / f"{name}.json").exists()

    def add(self, job: tuple[str, bytes], frames: int) -> None:
        """Encodes one image file, given as (name, content), over `frames` frames."""
        name, content = job
        self.store(name, load_frames(content, frames, self.encoding.size))

    def store(self, name: str, frames: Frames) -> None:
        """Encodes premultiplied frames under `name`, with the facts that the index records."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = encode(frames, self.encoding)
        facts = {
            "motion": own_motion(frames) if len(frames) > 1 else "",
            "psnr": round(psnr(frames, decode(content)), 2),
        }
        (self.folder / f"{name}.avif").write_bytes(content)
        (self.folder / f"{name}.json").write_text(json.dumps(facts), encoding="utf-8")

    def picture(self, name: str, design: str, source: str) -> Picture:
        """The index entry of a stored picture."""
        facts = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        return Picture(f"{name}.avif", design, source, facts["motion"], facts["psnr"])
