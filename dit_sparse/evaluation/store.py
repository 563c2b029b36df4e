"""The folder of an evaluation: settings, a JSON line for every finished run, and the clips.

A line is written after its clip, so that a killed run leaves at most a clip without a line, which
the next one replaces. Every process appends to a file of its own.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_sparse.plan_io import replace_file

Line = dict[str, Any]

_SETTINGS = "settings.json"
#: What a folder holds beside its settings and lines.
FOLDERS = ("clips", "features", "maps", "pictures")
_FULL = (errno.ENOSPC, errno.EDQUOT)


def slug(label: str) -> str:
    """The label of a variant as a file name; labels that differ have different ones."""
    plain = re.sub(r"[^\w.+-]+", "_", label)
    if plain == label.replace(" ", "_").replace("=", "_") and len(plain) <= 100:
        return plain
    return f"{plain[:100]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


def check_labels(lines: Iterable[Mapping[str, Any]]) -> None:
    """Checks that each label stands for one method: it has the last part of a path only.

    Raises:
        ValueError: two folders that options name have the same name.
    """
    known: dict[str, Any] = {}
    for line in lines:
        if "method" in line:
            method = known.setdefault(line["variant"], line["method"])
            if method != line["method"]:
                raise ValueError(
                    f"Expected one method by the name of {line['variant']!r}, got {method} and "
                    f"{line['method']}. Rename one of the folders, or choose another --output."
                )


@dataclass(frozen=True)
class Task:
    """A clip to make: a prompt and the seed of its noise."""

    prompt: str
    seed: int

    @property
    def slug(self) -> str:
        """The task as a file name."""
        return f"{hashlib.sha256(self.prompt.encode()).hexdigest()[:10]}-{self.seed}"


@dataclass(frozen=True)
class Store:
    """The folder of an evaluation.

    Args:
        folder: made when something is written.
        process: number of the process that writes.
    """

    folder: Path
    process: int = 0

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Writes the settings that all runs share, or compares them with those that are there.

        Only the first process writes.

        Raises:
            ValueError: the folder was begun with others, is damaged, or cannot be written.
        """
        path = self.folder / _SETTINGS
        known = self.settings()
        if known is None:
            if self.process > 0:
                return
            self._replace(path, (json.dumps(dict(settings), indent=1) + "\n").encode())
            return
        if "parts" in known and "parts" not in settings:
            raise ValueError(
                f"Expected the folder of one evaluation, got {str(self.folder)!r}, which was "
                f"merged from {', '.join(known['parts'])}. Go on in those, and merge them again."
            )
        for name, value in settings.items():
            if known.get(name) != value:
                raise ValueError(
                    f"Expected to go on with the evaluation in {str(self.folder)!r}, where "
                    f"{name} is {known.get(name)!r}, got {value!r}. Give the same again, or "
                    "another --output."
                )

    def settings(self) -> Line | None:
        """What `agree` wrote, or `None` in a new folder."""
        path = self.folder / _SETTINGS
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"Expected the settings of an evaluation in {str(path)!r}, got a damaged file "
                f"({error}). Choose another --output."
            ) from error

    def lines(self) -> list[Line]:
        """Every whole line of every process; what a kill cut short is left out."""
        found = []
        for path in sorted(self.folder.glob("runs-*.jsonl")):
            for text in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    found.append(json.loads(text))
        return found

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds a line and waits until it is on the disk."""
        path = self.folder / f"runs-{self.process}.jsonl"
        with self.room(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                size = file.seek(0, os.SEEK_END)
                if size:  # a line that a kill cut short must not swallow this one
                    file.seek(size - 1)
                    if file.read(1) != b"\n":
                        file.write(b"\n")
                file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())

    def clear(self) -> None:
        """Removes all that a merged folder holds: its parts may have been made again."""
        for path in (*self.folder.glob("runs-*.jsonl"), self.folder / _SETTINGS):
            path.unlink(missing_ok=True)
        for name in FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def clip_path(self, label: str, task: Task) -> Path:
        """Where the frames of a variant are."""
        return self.folder / "clips" / slug(label) / f"{task.slug}.npy"

    def feature_path(self, label: str, task: Task, extractor: str) -> Path:
        """Where the features of a variant's frames are."""
        return self.folder / "features" / extractor / slug(label) / f"{task.slug}.npy"

    def map_path(self, label: str) -> Path:
        """Where the block maps of a variant are; see `dit_sparse.evaluation.probe.block_maps`."""
        return self.folder / "maps" / f"{slug(label)}.npy"

    def picture_path(self, label: str, kind: str) -> Path:
        """Where a picture of a variant is: its "sheet", or the "moving" one."""
        return self.folder / "pictures" / f"{slug(label)}-{kind}.webp"

    def write_array(self, path: Path, array: np.ndarray) -> None:
        """Writes an array as it is, whole or not at all."""
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        self._replace(path, buffer.getvalue())

    def read_array(self, path: Path) -> np.ndarray | None:
        """An array that was written, or `None`."""
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None

    def write_text(self, name: str, text: str) -> Path:
        """Writes a text file of this name, whole or not at all."""
        path = self.folder / name
        self._replace(path, text.encode())
        return path

    def write_bytes(self, path: Path, data: bytes) -> None:
        """Writes a file, whole or not at all."""
        self._replace(path, data)

    def _replace(self, path: Path, data: bytes) -> None:
        with self.room(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, data)

    @contextlib.contextmanager
    def room(self, path: Path) -> Iterator[None]:
        """Turns what a disk says into a sentence."""
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise ValueError(
                    f"Expected room for {str(path)!r}, but the disk is full. Free some and run "
                    "the same command again: it goes on where it stopped."
                ) from error
            raise ValueError(
                f"Expected to write {str(path)!r}, got {error.strerror!r}. Choose another --output."
            ) from error
