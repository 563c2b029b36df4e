"""Paths of sprites: which actions there are, and where a sprite is in each frame.

Lengths are in units of the picture's shorter side, with the origin in the middle and y downwards;
angles are in radians, clockwise as seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
ACTIONS = (
    "still",
    "left",
    "right",
    "up",
    "down",
    "arc left",
    "arc right",
    "bounce",
    "circle",
    "spin",
    "swing",
    "shake",
    "zoom in",
    "zoom out",
)
WEIGHTS = np.array(
    [0.2, 0.08, 0.08, 0.06, 0.06, 0.05, 0.05, 0.1, 0.06, 0.08, 0.06, 0.04, 0.04, 0.04]
)
IN_PLACE = ("still", "bounce", "spin", "swing", "shake")  # fit beside another sprite
RATES = {"bounce": 2.2, "circle": 1.2, "spin": 1.5, "swing": 2.0, "shake": 6.0}  # usual periods
PERIODIC = tuple(RATES)
TRAVELS = ("left", "right", "up", "down", "arc left", "arc right", "bounce", "circle")
FEWEST_FRAMES = 9  # below, a periodic motion cannot be told from another


@dataclass(frozen=True, eq=False)
class Tracks:
    """Where N sprites are in each of F frames: float32 [N, F] each.

    Attributes:
        x, y: Centre.
        angle: Rotation.
        scale: Side of the sprite's square.
    """

    x: Floats
    y: Floats
    angle: Floats
    scale: Floats


@dataclass(frozen=True, eq=False)
class Motions:
    """How N sprites move, before the number of frames is known.

    Attributes:
        action: int [N], of `ACTIONS`.
        home: float [N, 2], where a sprite rests or its path is centred.
        reach: float [N, 2], how far it may go from there.
        scale: float [N], its side at rest.
        tilt: float [N], its angle at rest.
        rate: float [N], periods in 25 frames.
        phase: float [N] in [0, 1).
        sense: float [N], +1 or -1.
        eased: bool [N], whether it starts and stops gently.
    """

    action: NDArray[np.int64]
    home: Floats
    reach: Floats
    scale: Floats
    tilt: Floats
    rate: Floats
    phase: Floats
    sense: Floats
    eased: NDArray[np.bool_]

    def tracks(self, frames: int) -> Tracks:
        """Places over `frames` frames; a path is run once from end to end, periods repeat."""
        t = np.linspace(0, 1, frames, dtype=np.float32)[None] if frames > 1 else self.phase[:, None]
        gentle = t * t * (3 - 2 * t)
        e = np.where(self.eased[:, None], gentle, t)
        turns = self._turns(frames)[:, None] * t + self.phase[:, None]
        turn = 2 * np.pi * turns * self.sense[:, None]
        to_right, ones = 2 * e - 1, np.ones_like(e)
        hop = np.abs(np.sin(np.pi * turns))
        arch = 2 * to_right**2 - 1
        reach_x, reach_y = self.reach[:, :1], self.reach[:, 1:]
        along = {"left": -to_right, "right": to_right, "circle": 0.8 * np.cos(turn)}
        along |= {"arc left": -to_right, "arc right": to_right}
        down = {"up": -to_right, "down": to_right, "circle": 0.8 * np.sin(turn)}
        down |= {"arc left": 0.6 * arch, "arc right": 0.6 * arch, "bounce": 0.8 - 1.6 * hop}
        x = self._choose(along, 0 * ones) * reach_x
        x = x + self._choose({"shake": 0.04 * np.sin(turn)}, 0 * ones)
        y = self._choose(down, 0 * ones) * reach_y
        angle = self._choose({"spin": turn, "swing": 0.5 * np.sin(turn)}, 0 * ones)
        size = self._choose({"zoom in": 0.4 + 0.7 * e, "zoom out": 1.1 - 0.7 * e}, ones)
        return Tracks(
            x=(self.home[:, :1] + x).astype(np.float32),
            y=(self.home[:, 1:] + y).astype(np.float32),
            angle=(self.tilt[:, None] + angle).astype(np.float32),
            scale=(self.scale[:, None] * size).astype(np.float32),
        )

    def speed(self) -> NDArray[np.float32]:
        """Periods in 25 frames relative to what is usual for the action."""
        return self.rate / _usual_rate(self.action)

    def _turns(self, frames: int) -> Floats:
        # At least one period, so that the caption holds; at most one in 4 frames, so that it shows.
        return np.clip(self.rate * frames / 25, 1, max(frames / 4, 1)).astype(np.float32)

    def _choose(self, cases: dict[str, NDArray | float], otherwise: NDArray | float) -> NDArray:
        masks = [(self.action == ACTIONS.index(name))[:, None] for name in cases]
        return np.select(masks, list(cases.values()), otherwise)


def draw(
    rng: np.random.Generator,
    action: NDArray[np.int64],
    scale: Floats,
    room: Floats,
    centre: Floats,
) -> Motions:
    """Draws how sprites move.

    Args:
        rng: Source of randomness.
        action: int [N].
        scale: float [N], side of the sprite at rest.
        room: float [N, 2], half the sides of the region that a sprite has for itself.
        centre: float [N, 2], the middle of that region.
    """
    count = len(action)
    travels = np.isin(action, [ACTIONS.index(name) for name in TRAVELS])
    slack = np.maximum(room - 0.45 * scale[:, None], 0)
    reach = np.maximum(slack, np.minimum(0.3, room))
    wander = rng.uniform(-1, 1, (count, 2)) * slack
    across = np.stack([_moves_along(action, 0), _moves_along(action, 1)], 1)
    home = centre + np.where(across, 0, wander * np.where(travels, 0.6, 1.0)[:, None])
    return Motions(
        action=action,
        home=home.astype(np.float32),
        reach=(reach * rng.uniform(0.8, 1, (count, 1))).astype(np.float32),
        scale=scale.astype(np.float32),
        tilt=np.clip(rng.normal(0, 0.08, count), -0.2, 0.2).astype(np.float32),
        rate=_usual_rate(action)
        * rng.choice(np.array([0.6, 0.8, 1, 1, 1.25, 1.7], np.float32), count),
        phase=rng.random(count, dtype=np.float32),
        sense=rng.choice(np.array([-1, 1], dtype=np.float32), count),
        eased=rng.random(count) < 0.5,
    )


def _usual_rate(action: NDArray[np.int64]) -> Floats:
    return np.array([RATES.get(name, 1.0) for name in ACTIONS], dtype=np.float32)[action]


def _moves_along(action: NDArray[np.int64], axis: int) -> NDArray[np.bool_]:
    names = (
        ("left", "right", "arc left", "arc right", "circle"),
        ("up", "down", "arc left", "arc right", "circle", "bounce"),
    )[axis]
    return np.isin(action, [ACTIONS.index(name) for name in names])
