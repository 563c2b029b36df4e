"""The list of a model folder's files with sizes and digests, which tells damage from a bug.

`manifest.json` stands beside the files: `{"format": 1, "files": {path: {"bytes", "sha256"}}}`,
paths relative to the folder and with forward slashes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "manifest.json"
FORMAT = 1


def write_manifest(folder: Path) -> Path:
    """Lists every file of a folder in its `manifest.json`, replacing an earlier one.

    Returns:
        The file written.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": _digest(path),
        }
        for path in paths
    }
    target = folder / NAME
    content = json.dumps({"format": FORMAT, "files": files}, indent=1)
    target.write_bytes(content.encode() + b"\n")  # the same bytes on every system
    return target


def damage(folder: Path, *, digests: bool = False) -> str | None:
    """The first thing that is wrong with a model folder, or `None`.

    Sizes are compared, which takes no time and finds what is missing or cut short.

    Args:
        folder: with a `manifest.json`.
        digests: read every file and compare its SHA-256 too.

    Returns:
        What was expected and found, without a full stop.
    """
    try:
        files = _read(folder / NAME)
    except FileNotFoundError:
        what = "no such folder" if not folder.is_dir() else "a folder without it"
        return f"Expected {NAME} in {folder}, found {what}"
    except (KeyError, TypeError, ValueError, OSError) as error:
        return f"Expected a list of files in {folder / NAME}, but it cannot be read: {error!r}"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"Expected {entry['bytes']:,} bytes in {path}, found no such file"
        found = path.stat().st_size
        if found != entry["bytes"]:
            return f"Expected {entry['bytes']:,} bytes in {path}, got {found:,}"
        if digests and (digest := _digest(path)) != entry["sha256"]:
            return f"Expected SHA-256 {entry['sha256'][:12]}... of {path}, got {digest[:12]}..."
    return None


def _read(path: Path) -> Mapping[str, Mapping[str, Any]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']} instead of {FORMAT}")
    return {
        name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
        for name, entry in content["files"].items()
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
