"""Puts folders of one evaluation that was split by methods into one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dit_sparse.evaluation.metrics import Clip, psnr
from dit_sparse.evaluation.runner import done
from dit_sparse.evaluation.store import FOLDERS, Line, Store, check_labels
from dit_sparse.evaluation.variants import STOCK


def merge(folders: Sequence[Path], into: Path) -> Store:
    """Copies the runs of several folders into one, whatever they have finished.

    Speedups stay those over the dense variants of the same folder, since folders may come from
    different devices of one kind. Dense clips are the first folder's; where another one's differ,
    a gap says by how much.

    Args:
        folders: each with its own methods, on the same model, with the same settings.
        into: a new folder, or one that was merged before and is made anew.

    Raises:
        ValueError: fewer than two folders, no evaluation in one of them, other settings or methods
            by the same names, or the target is in use.
    """
    parts = [Store(folder) for folder in folders]
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise ValueError(
            f"Expected two or more different folders to merge, got {[str(f) for f in folders]}."
        )
    settings = _shared_settings(parts)
    check_labels(line for part in parts for line in part.lines())
    target = Store(into)
    known = target.settings()
    if into.exists() and any(into.iterdir()) and not (known or {}).get("parts"):
        raise ValueError(
            f"Expected a new folder to merge into, got {str(into)!r}, which holds something else. "
            "Choose another --output."
        )
    if known is not None:
        target.clear()
    target.agree({**settings, "parts": [folder.name for folder in folders]})
    for number, part in enumerate(parts):
        lines = [{**line, "part": number} for line in part.lines()]
        lines += _differences(parts[0], part, number) if number else []
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        target.write_text(f"runs-{number}.jsonl", text)
        with target.room(into):
            _copy(part.folder, into)
    return target


def _shared_settings(parts: Sequence[Store]) -> Line:
    found = [part.settings() for part in parts]
    for part, settings in zip(parts, found, strict=True):
        if settings is None or "parts" in settings:
            what = "nothing" if settings is None else "a merged one"
            raise ValueError(
                f"Expected a folder of `dit-sparse evaluate` in {str(part.folder)!r}, got {what}."
            )
        part.agree(found[0] or {})
    return found[0] or {}


def _copy(source: Path, into: Path) -> None:
    """Whatever `into` does not have yet."""
    for path in sorted(source.rglob("*")):
        place = path.relative_to(source)
        if place.parts[0] in FOLDERS and path.is_file() and not (into / place).exists():
            (into / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, into / place)


def _differences(first: Store, other: Store, number: int) -> list[Line]:
    """A further line of gaps, if the dense clips of two folders are not the same."""
    worst: list[float] = []
    for label, task in sorted(done(other.lines()), key=str):
        clips = [store.read_array(store.clip_path(label, task)) for store in (first, other)]
        a, b = clips
        if label == STOCK and a is not None and b is not None and not np.array_equal(a, b):
            worst.append(psnr(Clip.of(a, ""), Clip.of(b, ""))["psnr"])
    if not worst:
        return []
    earlier = [line["gaps"] for line in other.lines() if line["kind"] == "gaps"]
    why = (
        f"{len(worst)} differ from those of {first.folder.name!r}, by "
        f"{min(worst):.1f} dB PSNR at worst; its methods are compared with its own"
    )
    gaps = {**(earlier[-1] if earlier else {}), f"dense clips of {other.folder.name!r}": why}
    return [{"kind": "gaps", "gaps": gaps, "part": number}]
