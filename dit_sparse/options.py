"""Checks of options that several methods have; bad values raise a sentence."""

from __future__ import annotations

from collections.abc import Collection

from dit_sparse.frame import Frame
from dit_sparse.selection import FORCED


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_share(name: str, value: object) -> None:
    """Raises unless a share is absent, or above 0 and at most 1."""
    if value is not None and not (is_number(value) and 0.0 < value <= 1.0):  # type: ignore[operator]
        raise ValueError(f"Expected a {name} above 0 and at most 1, got {value!r}.")


def check_choice(name: str, value: object, known: Collection[str]) -> None:
    """Raises unless a word is one of those known."""
    if value not in known:
        raise ValueError(f"Expected {name} among {', '.join(known)}, got {value!r}.")


def check_block(value: object) -> None:
    """Raises unless blocks have a size that the fast kernels take."""
    if type(value) is not int or value not in (64, 128):
        raise ValueError(f"Expected a block of 64 or 128 tokens, got {value!r}.")


def check_reuse(value: object) -> None:
    """Raises unless a plan serves a whole number of steps."""
    if type(value) is not int or value < 1:
        raise ValueError(f"Expected reuse_steps of at least 1, an integer, got {value!r}.")


def forced_names(value: object) -> tuple[str, ...]:
    """Names of forced blocks as a tuple."""
    if not isinstance(value, (tuple, list)) or any(name not in FORCED for name in value):
        raise ValueError(
            f"Expected forced as a tuple of names among {', '.join(FORCED)}, got {value!r}."
        )
    return tuple(value)


def check_least(value: object) -> None:
    """Raises unless a least number of blocks is a count."""
    if type(value) is not int or value < 0:
        raise ValueError(f"Expected least as a number of blocks of at least 0, got {value!r}.")


def blocks_for(density: float, frame: Frame, least: int) -> int:
    """How many of the picture's key blocks a density means: rounded down, and at least so many.

    Raises:
        ValueError: less than one block.
    """
    count = max(int(density * frame.candidates + 1e-9), min(least, frame.candidates))
    if count < 1:
        raise ValueError(
            f"Expected a density of at least {1 / frame.candidates:.3g} for {frame.candidates} key "
            f"blocks of {frame.blocks.size} tokens, got {density}. Raise it, take smaller blocks "
            "or set least."
        )
    return count
