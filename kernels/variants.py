"""The table of kernel variants: what runs for a GPU, a dtype, a head dim and a Triton version.

It is made offline by `scripts/tune_kernels.py`, never at run time, and shipped as `variants.json`.
A variant that Triton compiles badly here is refused by `launch.launch_specialised`, whatever the
table says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

from dit_sparse.kernels.architecture import generation

#: What computes whole entries: `hopper` has a program for every query block, `hopper_gluon` one for
#: every multiprocessor, `portable` runs anywhere.
Kernel = Literal["hopper", "hopper_gluon", "portable"]
#: What masks entries by coordinates, see `Masked`.
Masking = Literal["hopper", "portable"]


@dataclass(frozen=True)
class Whole:
    """Which kernel computes the entries that need no mask, for blocks of 128 tokens.

    Args:
        architecture: such as `"sm_90"`; other GPUs have other rows or run the portable kernel.
        triton: version that it was compiled and tried with, such as `"3.6"`.
        dtype: name of a dtype of torch.
        head_dim: padded to a power of two.
        ragged: whether some key blocks are short.
        kernel: the choice.
        source: `"measured"` by the tuner, see `trials`, or only `"compiled"`.
        trials: what the tuner saw of every variant: milliseconds, or why it was refused.
    """

    architecture: str
    triton: str
    dtype: str
    head_dim: int
    ragged: bool
    kernel: Kernel
    source: Literal["measured", "compiled"]
    trials: dict[str, float | str]

    def __post_init__(self) -> None:
        _check_kernel(self.kernel, get_args(Kernel))


@dataclass(frozen=True)
class Masked:
    """Which kernel computes the entries that are masked by coordinates.

    Args:
        architecture, triton, source, trials: see `Whole`.
        kernel: `hopper` masks them by a product in the loop for whole entries, see `mask_product`;
            `portable` adds them to what the kernel for whole entries has written.
    """

    architecture: str
    triton: str
    kernel: Masking
    source: Literal["measured", "compiled"]
    trials: dict[str, float | str]

    def __post_init__(self) -> None:
        _check_kernel(self.kernel, get_args(Masking))


@dataclass(frozen=True)
class TileRow:
    """How the portable kernel is cut.

    Args:
        architecture: the oldest that the row is for, such as `"sm_80"` or `"gfx90a"`; newer ones of
            its line take it unless they have their own.
        itemsize: bytes of an element.
        head_dim: the largest that the row is for.
        boxed: whether entries are masked or have biases, which takes registers.
        keys, warps, stages, tma, queries: see `tiles.Tile`; warps for that many queries.
    """

    architecture: str
    itemsize: int
    head_dim: int
    boxed: bool
    keys: int
    warps: int
    stages: int
    tma: bool
    queries: int


@dataclass(frozen=True)
class Table:
    """All rows, and where they come from."""

    provenance: dict[str, Any]
    whole: tuple[Whole, ...]
    masked: tuple[Masked, ...]
    tiles: tuple[TileRow, ...]

    @staticmethod
    def of(record: dict[str, Any]) -> Table:
        """Reads what `record` made.

        Raises:
            ValueError: a row with other fields than expected.
        """
        return Table(
            record["provenance"],
            tuple(_row(Whole, row) for row in record["whole"]),
            tuple(_row(Masked, row) for row in record["masked"]),
            tuple(_row(TileRow, row) for row in record["tiles"]),
        )

    def record(self) -> dict[str, Any]:
        """The table as JSON holds it."""
        return {
            "provenance": self.provenance,
            "whole": [vars(row) for row in self.whole],
            "masked": [vars(row) for row in self.masked],
            "tiles": [vars(row) for row in self.tiles],
        }


@cache
def table() -> Table:
    """The shipped table."""
    text = files("dit_sparse.kernels").joinpath("variants.json").read_text(encoding="utf-8")
    return Table.of(json.loads(text))


@cache
def whole_kernel(architecture: str, triton: str, dtype: str, head_dim: int, ragged: bool) -> Kernel:
    """The kernel for entries that need no mask.

    A Triton version without rows takes those of the last one before it, and the portable kernel
    where there is none.

    Args:
        architecture: see `architecture.architecture`.
        triton: version, of which the first two parts count.
        dtype, head_dim, ragged: see `Whole`.
    """
    rows = [
        row
        for row in table().whole
        if (row.dtype, row.head_dim, row.ragged) == (dtype, head_dim, ragged)
    ]
    return _newest(rows, architecture, triton)


@cache
def masked_kernel(architecture: str, triton: str) -> Kernel:
    """The kernel for entries that are masked by coordinates; see `whole_kernel`."""
    return _newest(table().masked, architecture, triton)


def _newest(rows: Sequence[Whole | Masked], architecture: str, triton: str) -> Kernel:
    wanted = _version(triton)
    fitting = [
        row for row in rows if row.architecture == architecture and _version(row.triton) <= wanted
    ]
    return max(fitting, key=lambda row: _version(row.triton)).kernel if fitting else "portable"


@cache
def tile_row(architecture: str, itemsize: int, head_dim: int, boxed: bool) -> TileRow | None:
    """How the portable kernel is cut; what is older than all rows of its line takes the oldest.

    Returns:
        `None` where no row is for elements and head dims of that size: every way to cut the kernel
        keeps many registers in memory there.
    """
    line, wanted = generation(architecture)
    rows = {
        row: generation(row.architecture)[1]
        for row in table().tiles
        if (row.itemsize, row.boxed) == (itemsize, boxed)
        and head_dim <= row.head_dim
        and generation(row.architecture)[0] == line
    }
    if not rows:
        return None
    known = sorted(set(rows.values()))
    newest = max((one for one in known if one <= wanted), default=known[0])
    fitting = (row for row, number in rows.items() if number == newest)
    return min(fitting, key=lambda row: row.head_dim)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _check_kernel(kernel: str, known: Sequence[str]) -> None:
    if kernel not in known:
        raise ValueError(
            f"Expected a kernel among {', '.join(known)}, got {kernel!r}. "
            "Mend the row in variants.json."
        )


def _row(kind: type[Any], values: dict[str, Any]) -> Any:
    expected = {field.name for field in fields(kind)}
    if set(values) != expected:
        raise ValueError(
            f"Expected rows with {', '.join(sorted(expected))} in variants.json, "
            f"got {', '.join(sorted(values))}. Make the table again with scripts/tune_kernels.py."
        )
    return kind(**values)
