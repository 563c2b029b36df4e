"""Colours by the names that captions use."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "green": (52, 160, 70),
    "light green": (160, 222, 140),
    "dark green": (16, 84, 48),
    "teal": (24, 140, 140),
    "cyan": (90, 218, 232),
    "light blue": (150, 200, 245),
    "blue": (40, 96, 220),
    "dark blue": (18, 36, 104),
    "purple": (120, 58, 180),
    "lavender": (196, 176, 240),
    "pink": (248, 150, 190),
    "magenta": (216, 44, 150),
    "brown": (128, 80, 44),
    "beige": (232, 216, 184),
    "white": (250, 250, 250),
    "light grey": (200, 202, 206),
    "grey": (128, 130, 134),
    "black": (16, 16, 20),
}
NAMES = tuple(COLOURS)
RGB: NDArray[np.float32] = np.array(list(COLOURS.values()), np.float32) / np.float32(255)


def subset(*names: str) -> NDArray[np.int64]:
    """Indices of some colours in `NAMES`."""
    return np.array([NAMES.index(name) for name in names])


SKIES = subset("light blue", "blue", "cyan", "pink", "orange", "lavender", "light grey")
GROUNDS = subset("green", "dark green", "light green", "brown", "beige", "white", "grey", "yellow")
NIGHTS = subset("dark blue", "black", "purple", "dark green")
