"""Windows found for every layer and head, as a file: JSON that can be read and edited by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from dit_sparse.grid import TokenGrid
from dit_sparse.model_identity import ModelIdentity
from dit_sparse.per_axis import Extents
from dit_sparse.plan_io import replace_file

#: The name of a table in a folder.
TABLE = "windows.json"
_FORMAT, _VERSION = "dit_sparse.windows", 2

#: The windows of every layer's heads.
Windows: TypeAlias = tuple[tuple[Extents, ...], ...]


@dataclass(frozen=True)
class WindowTable:
    """Sliding-tile windows of a model on one grid.

    Args:
        grid: the token grid that they were searched on.
        tile: tokens of a tile along (frames, height, width).
        windows: tiles of a window along these axes, for each segment of the steps, layer and head;
            a segment of which no step was seen has no layers.
        density: mean share of blocks that they visit.
        error: mean squared difference from dense attention on the samples of the search.
        segments: the segment of every denoising step; with one segment, any number of steps will
            do, and it may be left out.
        model: the transformer that they were searched on; `None` if that is not known.
        provenance: how they were found; plain values.
    """

    grid: TokenGrid
    tile: Extents
    windows: tuple[Windows, ...]
    density: float
    error: float
    segments: tuple[int, ...] = ()
    model: ModelIdentity | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        seen = [windows for windows in self.windows if windows]
        if not seen or any(not heads for windows in seen for heads in windows):
            raise ValueError("Expected a table with a window for each layer and head, got gaps.")
        if len({tuple(map(len, windows)) for windows in seen}) > 1:
            raise ValueError("Expected the same layers and heads in every segment, got others.")
        every = [window for windows in seen for heads in windows for window in heads]
        for numbers in (self.tile, *every):
            if len(numbers) != 3 or any(type(n) is not int or n < 1 for n in numbers):
                raise ValueError(
                    "Expected tiles and windows of three integers of at least 1, got "
                    f"{list(numbers)}."
                )
        count = len(self.windows)
        if not set(self.segments) <= set(range(count)) or (count > 1 and not self.segments):
            raise ValueError(
                f"Expected for every step one of the {count} segments, got {list(self.segments)}."
            )

    @property
    def layers(self) -> int:
        return max(map(len, self.windows))

    @property
    def heads(self) -> int:
        return len(next(windows for windows in self.windows if windows)[0])

    def segment(self, step: int | None, steps: int | None) -> int:
        """The segment of a step.

        Raises:
            ValueError: there are several, and the step is not known, or the generation has more or
                fewer steps than the search saw.
        """
        if len(self.windows) == 1:
            return 0
        if step is None or steps is None:
            raise ValueError(
                "Expected to know the denoising step for windows that differ between steps, got a "
                "forward outside a pipeline. Apply the method to the pipeline, or pass steps=."
            )
        if steps != len(self.segments) or not 0 <= step < steps:
            raise ValueError(
                f"Expected the {len(self.segments)} denoising steps for which the windows were "
                f"searched, got step {step} of {steps}. Take that many steps, or search for others."
            )
        return self.segments[step]

    def of_layer(
        self, layer: int, layers: int, grid: TokenGrid, segment: int = 0
    ) -> tuple[Extents, ...]:
        """The windows of a layer's heads.

        Raises:
            ValueError: a model of another number of layers, another grid, or a segment of which no
                step was seen.
        """
        if grid != self.grid or layers != self.layers:
            raise ValueError(
                f"Expected the grid {self.grid} and {self.layers} layers, for which the "
                f"windows were searched, got {grid} and {layers}. Search them for this model and "
                "size."
            )
        if not self.windows[segment]:
            raise ValueError(
                "Expected a step that the search has seen, got step "
                f"{self.segments.index(segment)} or later in its segment {segment}. Keep those "
                "steps dense, or search for the transformer that runs them."
            )
        return self.windows[segment][layer]

    def __str__(self) -> str:
        return (
            f"WindowTable({self.layers} layers x {self.heads} heads in {len(self.windows)} "
            f"segments on {self.grid}, tile {self.tile}, density {self.density:.3f})"
        )


def save_table(table: WindowTable, path: str | os.PathLike[str]) -> Path:
    """Writes a table, whole or not at all, and returns the path.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    contents = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": table.model and table.model.to_dict(),
        "grid": str(table.grid),
        "tile": table.tile,
        "segments": table.segments,
        "density": table.density,
        "error": table.error,
        "provenance": dict(table.provenance),
        "windows": table.windows,
    }
    replace_file(path, (json.dumps(contents) + "\n").encode())
    return path


def load_table(path: str | os.PathLike[str]) -> WindowTable:
    """Reads a table that `save_table` wrote.

    Args:
        path: the file, or a folder that `dit-sparse calibrate --method sta` wrote.

    Raises:
        ValueError: the file is something else, or written in another format version.
        OSError: the file cannot be read.
    """
    path = Path(path)
    text = (path / TABLE if path.is_dir() else path).read_text(encoding="utf-8")
    try:
        found = json.loads(text)
        if (found["format"], found["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"format {found['format']} {found['version']}")
        return WindowTable(
            TokenGrid.parse(found["grid"]),
            _triple(found["tile"]),
            tuple(
                tuple(tuple(_triple(window) for window in heads) for heads in windows)
                for windows in found["windows"]
            ),
            float(found["density"]),
            float(found["error"]),
            tuple(found["segments"]),
            None if found["model"] is None else ModelIdentity.of_dict(found["model"]),
            dict(found["provenance"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"Expected a table of windows, {_FORMAT} {_VERSION}, in {os.fspath(path)}, got: "
            f"{error}. Write it with save_table."
        ) from error


def _triple(numbers: Any) -> Extents:
    frames, rows, columns = numbers
    return frames, rows, columns
