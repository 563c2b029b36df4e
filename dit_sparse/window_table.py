"""Windows found for every layer and head, as a file: JSON that can be read and edited by hand."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_sparse.grid import TokenGrid
from dit_sparse.per_axis import Extents

_FORMAT, _VERSION = "dit_sparse.windows", 1


@dataclass(frozen=True)
class WindowTable:
    """Sliding-tile windows of a model on one grid.

    Args:
        grid: the token grid that they were searched on.
        tile: tokens of a tile along (frames, height, width).
        windows: tiles of a window along these axes, for each layer and head.
        density: mean share of blocks that they visit.
        error: mean squared difference from dense attention on the samples of the search.
    """

    grid: TokenGrid
    tile: Extents
    windows: tuple[tuple[Extents, ...], ...]
    density: float
    error: float

    def __post_init__(self) -> None:
        if not self.windows or any(not heads for heads in self.windows):
            raise ValueError("Expected a table with a window for each layer and head, got gaps.")
        for numbers in (self.tile, *(window for heads in self.windows for window in heads)):
            if len(numbers) != 3 or any(type(n) is not int or n < 1 for n in numbers):
                raise ValueError(
                    "Expected tiles and windows of three integers of at least 1, got "
                    f"{list(numbers)}."
                )

    def of_layer(self, layer: int, layers: int, grid: TokenGrid) -> tuple[Extents, ...]:
        """The windows of a layer's heads.

        Raises:
            ValueError: a model of another number of layers, or another grid.
        """
        if grid != self.grid or layers != len(self.windows):
            raise ValueError(
                f"Expected the grid {self.grid} and {len(self.windows)} layers, for which the "
                f"windows were searched, got {grid} and {layers}. Search them for this model and "
                "size."
            )
        return self.windows[layer]

    def __str__(self) -> str:
        return (
            f"WindowTable({len(self.windows)} layers on {self.grid}, tile {self.tile}, "
            f"density {self.density:.3f})"
        )


def save_table(table: WindowTable, path: str | os.PathLike[str]) -> Path:
    """Writes a table and returns the path.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    contents = {
        "format": _FORMAT,
        "version": _VERSION,
        "grid": str(table.grid),
        "tile": table.tile,
        "density": table.density,
        "error": table.error,
        "windows": table.windows,
    }
    path.write_text(json.dumps(contents) + "\n", encoding="utf-8")
    return path


def load_table(path: str | os.PathLike[str]) -> WindowTable:
    """Reads a table that `save_table` wrote.

    Raises:
        ValueError: the file is something else, or written in another format version.
        OSError: the file cannot be read.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        found = json.loads(text)
        if (found["format"], found["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"format {found['format']} {found['version']}")
        return WindowTable(
            TokenGrid.parse(found["grid"]),
            _triple(found["tile"]),
            tuple(tuple(_triple(window) for window in heads) for heads in found["windows"]),
            float(found["density"]),
            float(found["error"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"Expected a table of windows, {_FORMAT} {_VERSION}, in {os.fspath(path)}, got: "
            f"{error}. Write it with save_table."
        ) from error


def _triple(numbers: Any) -> Extents:
    frames, rows, columns = numbers
    return frames, rows, columns
