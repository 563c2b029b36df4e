"""Whether the rows of a plan differ so much in length that the order in which they run matters."""

from __future__ import annotations

from torch import Tensor

_MUCH_LONGER = 1.5  # windows that move inwards at the borders are below it


def uneven(count: Tensor) -> bool:
    """Whether the longest of these rows is much longer than the mean one; waits for the device.

    Args:
        count: entries of every row, in any shape.
    """
    return count.numel() > 0 and much_longer(float(count.max()), float(count.float().mean()))


def much_longer(longest: float, mean: float) -> bool:
    return longest > _MUCH_LONGER * mean
