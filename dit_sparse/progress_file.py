"""What an interrupted calibration has finished, as a file: tensors, and a header in JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from dit_sparse.plan_io import replace_file


def write_progress(
    path: Path, key: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Writes a file, whole or not at all; folders are made.

    Args:
        key: what kind of progress it is.
        header: plain values; `settings` are those that `read_progress` compares.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, safetensors.torch.save(dict(tensors), {key: json.dumps(header)}))


def read_progress(
    path: Path, key: str, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Header and tensors of what `write_progress` wrote, or `None` where there is no file.

    Raises:
        ValueError: the file is damaged, or was made with other settings.
    """
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(os.fspath(path), "pt") as file:
            header = json.loads((file.metadata() or {})[key])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"Expected the progress of a calibration in {str(path)!r}, got a damaged file "
            f"({error}). Delete it to begin anew."
        ) from error
    known = header["settings"]
    plain = json.loads(json.dumps(dict(settings)))  # a tuple is a list by then
    changed = [name for name, value in plain.items() if known.get(name) != value]
    if changed:
        name = changed[0]
        raise ValueError(
            f"Expected to go on with the calibration begun in {str(path.parent)!r}, where "
            f"{name} is {known.get(name)!r}, got {settings[name]!r}. Give the "
            f"same again, or another folder, or delete {path.name} to begin anew."
        )
    return header, tensors
