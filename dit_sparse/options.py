"""Checks of options that several methods have; bad values raise a sentence."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from dit_sparse import orders
from dit_sparse.frame import Frame
from dit_sparse.selection import FORCED


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_share(name: str, value: object) -> None:
    """Raises unless a share is absent, or above 0 and at most 1."""
    if value is not None and not (is_number(value) and 0.0 < value <= 1.0):  # type: ignore[operator]
        raise ValueError(f"Expected a {name} above 0 and at most 1, got {value!r}.")


def check_one_share(purpose: str, first: str, second: str, values: Mapping[str, object]) -> None:
    """Raises unless one of two shares is given, and in range.

    Args:
        purpose: what it is, to follow "Expected a ... or a ...".
        first, second: the names.
        values: by name.
    """
    if (values[first] is None) == (values[second] is None):
        raise ValueError(
            f"Expected a {first} or a {second} {purpose}, got {first} {values[first]} and "
            f"{second} {values[second]}. Give one, such as {first}=0.3."
        )
    for name in (first, second):
        check_share(name, values[name])


def check_choice(name: str, value: object, known: Collection[str]) -> None:
    """Raises unless a word is one of those known."""
    if value not in known:
        raise ValueError(f"Expected {name} among {', '.join(known)}, got {value!r}.")


def check_block(value: object) -> None:
    """Raises unless blocks have a size that the fast kernels take."""
    if type(value) is not int or value not in (64, 128):
        raise ValueError(f"Expected a block of 64 or 128 tokens, got {value!r}.")


def check_planning(
    *, order: object, least: object, block: object, reuse_steps: object, forced: object
) -> tuple[str, ...]:
    """Raises unless the options of methods that plan from q and k in every call are in range.

    Returns:
        The names of forced blocks, as a tuple.
    """
    check_choice("order", order, orders.NAMES)
    if type(least) is not int or least < 0:
        raise ValueError(f"Expected least as a number of blocks of at least 0, got {least!r}.")
    check_block(block)
    if type(reuse_steps) is not int or reuse_steps < 1:
        raise ValueError(f"Expected reuse_steps of at least 1, an integer, got {reuse_steps!r}.")
    if not isinstance(forced, (tuple, list)) or any(name not in FORCED for name in forced):
        raise ValueError(
            f"Expected forced as a tuple of names among {', '.join(FORCED)}, got {forced!r}."
        )
    return tuple(forced)


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
