"""Sizes of training batches."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from scripts.training.recipe import Recipe


@dataclass(frozen=True)
class Bucket:
    """Clips of one size, so many at a time, drawn with a weight."""

    frames: int
    height: int
    width: int
    batch: int
    weight: int = 1

    def __str__(self) -> str:
        size = f"{self.frames}x{self.height}x{self.width}:{self.batch}"
        return size if self.weight == 1 else f"{size}*{self.weight}"


def parse_buckets(text: str, recipe: Recipe) -> tuple[Bucket, ...]:
    """Reads `FRAMESxHEIGHTxWIDTH:BATCH*WEIGHT,...`; the weight may be left out.

    Raises:
        ValueError: the text is malformed, or the recipe cannot make a size.
    """
    buckets = []
    for item in text.split(","):
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+):(\d+)(?:\*(\d+))?", item.strip())
        if not found:
            raise ValueError(
                f"Expected sizes as FRAMESxHEIGHTxWIDTH:BATCH, such as 49x128x128:8, got {item!r}."
            )
        bucket = Bucket(*(int(number) for number in found.groups(default="1")))
        if not recipe.fits((bucket.frames, bucket.height, bucket.width)):
            raise ValueError(f"Expected {recipe.size_rule}, got {item!r}.")
        if not all((bucket.height, bucket.width, bucket.batch, bucket.weight)):
            raise ValueError(f"Expected sizes and batches above 0, got {item!r}.")
        buckets.append(bucket)
    return tuple(buckets)


def pick(buckets: Sequence[Bucket], seed: int, step: int) -> Bucket:
    """The bucket of a step: the same for every process and after every resume."""
    weights = [bucket.weight for bucket in buckets]
    return random.Random(f"{seed} {step}").choices(buckets, weights)[0]
