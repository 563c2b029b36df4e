"""Denoising steps in segments, each of which has masks of its own."""

from __future__ import annotations

from typing import Literal, TypeAlias

Split: TypeAlias = Literal["uniform", "halves"]


def segment_table(steps: int, segments: int, split: Split = "uniform") -> tuple[int, ...]:
    """The segment of every step.

    Args:
        steps: of the generation.
        segments: how many segments.
        split: `"uniform"` puts step i into segment floor(segments * i / steps), as PARO's code
            does; `"halves"` cuts the first half of the steps evenly and makes the second half one
            segment, as its paper does.

    Raises:
        ValueError: no segment, or more than the steps can fill.
    """
    early = steps if split == "uniform" else steps // 2
    parts = segments if split == "uniform" else segments - 1
    if segments < 1 or parts > early:
        raise ValueError(
            f"Expected 1 to {early if split == 'uniform' else early + 1} segments of {steps} steps "
            f"(split {split!r}), got {segments}. Take fewer."
        )
    if parts == 0:
        return (0,) * steps
    table = [parts * i // early for i in range(early)]
    return (*table, *[segments - 1] * (steps - early))
