"""Options with one value per axis of the grid, checked; every refusal names the axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from dit_sparse.grid import TokenGrid

Extents: TypeAlias = tuple[int, int, int]

AXES = ("frames", "height", "width")


def is_count(value: object) -> bool:
    """Whether a value is an integer of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_share(value: object) -> bool:
    """Whether a value is a share of an axis: a float above 0 and at most 1."""
    return isinstance(value, float) and 0.0 < value <= 1.0  # NaN fails too


def checked(
    value: object, name: str, *, shares: bool = False, unit: str = "token"
) -> tuple[int | float, ...]:
    """One number per axis as a tuple.

    Args:
        value: a tuple or list of one to three numbers: (frames, height, width), (height, width) or
            (width,).
        name: what they are, for the sentence.
        shares: whether shares of an axis may be among them.
        unit: what is counted, for the sentence.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(value, (tuple, list)) or len(value) not in (1, 2, 3):
        raise ValueError(
            f"Expected {name} as (frames, height, width), (height, width) or (width,), got "
            f"{value!r}. Give one number per axis."
        )
    for axis, size in zip(AXES[-len(value) :], value, strict=True):
        if not is_count(size) and not (shares and is_share(size)):
            share = ", or a share of the axis above 0.0 and at most 1.0" if shares else ""
            raise ValueError(
                f"Expected a {name} along {axis} of at least 1 {unit}, an integer{share}, "
                f"got {size!r}."
            )
    return tuple(value)


def check_everywhere(value: object, name: str) -> None:
    """Raises `ValueError` unless one number for all axes is an integer of at least 1."""
    if not is_count(value):
        raise ValueError(
            f"Expected a {name} of at least 1 along frames, height and width, as one integer or "
            f"one per axis, got {value!r}."
        )


def counts(value: object, name: str, *, unit: str = "token") -> tuple[int, ...]:
    """`checked` without shares: integers."""
    return tuple(int(n) for n in checked(value, name, unit=unit))


def per_head(value: object) -> bool:
    """Whether a value has, in place of numbers, a tuple of numbers for each head."""
    return isinstance(value, (tuple, list)) and bool(value) and isinstance(value[0], (tuple, list))


def flags(value: object, name: str) -> tuple[bool, ...]:
    """One truth value per axis as a tuple.

    Raises:
        ValueError: anything else.
    """
    fits = isinstance(value, (tuple, list)) and len(value) in (1, 2, 3)
    if not fits or not all(isinstance(flag, bool) for flag in value):  # type: ignore[attr-defined]
        raise ValueError(
            f"Expected {name} as true or false, or one of them per axis of (frames, height, "
            f"width), got {value!r}."
        )
    return tuple(value)  # type: ignore[arg-type]


def of_rank(values: Sequence[int | float], name: str, grid: TokenGrid) -> tuple[int | float, ...]:
    """Three values from as many as the grid has axes: an image has one frame, a line one row.

    Raises:
        ValueError: an axis of several tokens is left out.
    """
    missing = 3 - len(values)
    if any(extent > 1 for extent in grid.shape[:missing]):
        lacking = [axis for axis, n in zip(AXES[:missing], grid.shape, strict=False) if n > 1]
        raise ValueError(
            f"Expected {name} as (frames, height, width) for the grid {grid}, got {tuple(values)} "
            f"without one along {' and '.join(lacking)}. Give one number per axis."
        )
    return (*[1] * missing, *values)


def clipped(values: Sequence[int], name: str, grid: TokenGrid) -> Extents:
    """Tokens per axis; more than the axis has mean all of it.

    Raises:
        ValueError: another rank than the grid's.
    """
    ranked = of_rank(values, name, grid)
    frames, rows, columns = (min(int(n), m) for n, m in zip(ranked, grid.shape, strict=True))
    return frames, rows, columns


def everywhere(value: int, grid: TokenGrid) -> Extents:
    """One number for all axes; 1 along an axis of one token, which has no other."""
    frames, rows, columns = (value if extent > 1 else 1 for extent in grid.shape)
    return frames, rows, columns


def tokens(
    values: Sequence[int | float],
    name: str,
    grid: TokenGrid,
    limits: Extents,
    dilation: Extents = (1, 1, 1),
    *,
    round_up: bool = False,
) -> Extents:
    """Tokens per axis from counts and shares.

    Args:
        values: one per axis; shares are of the positions that remain of an axis after dilation.
        limits: the most tokens per axis.
        dilation: named in the sentence where it is what limits.
        round_up: whether shares are rounded up, not to the nearest.

    Raises:
        ValueError: another rank than the grid's, or a number beyond its limit.
    """
    found = []
    for axis, extent, limit, size, step in zip(
        AXES, grid.shape, limits, of_rank(values, name, grid), dilation, strict=True
    ):
        if isinstance(size, float):
            wanted = size * extent / step
            # A little less, because 0.1 * 30 is a little more than 3.
            nearest = math.ceil(wanted - 1e-9) if round_up else round(wanted)
            found.append(min(limit, max(1, nearest)))
        elif size <= limit:
            found.append(size)
        else:
            dilated = f" with a dilation of {step}" if step > 1 else ""
            raise ValueError(
                f"Expected a {name} along {axis} between 1 and {limit} tokens, "
                f"got {size!r} on the grid {grid}{dilated}."
            )
    return found[0], found[1], found[2]


def check_block(block: object) -> None:
    """Raises `ValueError` unless a block is of a size that all kernels take."""
    if type(block) is not int or block not in (64, 128):
        raise ValueError(f"Expected a block of 64 or 128 tokens, got {block!r}.")
