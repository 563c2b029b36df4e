"""How long the lists of a plan may be, and whether they differ so much that their order matters."""

from __future__ import annotations

import torch
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


def check_entries(entries: int) -> None:
    """Refuses a plan of more entries than 32 bits number.

    Raises:
        ValueError: there are more.
    """
    if entries > torch.iinfo(torch.int32).max:
        raise ValueError(
            f"Expected at most 2**31 - 1 entries in a plan, got {entries}. Use larger blocks or a "
            "smaller window, share lists between heads, or split the batch."
        )
