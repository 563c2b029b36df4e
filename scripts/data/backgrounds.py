"""Procedural backgrounds: drawn on the host as a few numbers, rendered on the device in batches.

Lengths are in units of the picture's shorter side, with the origin in the middle and y downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from scripts.data import palette

KINDS = ("plain", "gradient", "glow", "stripes", "checker", "dots", "clouds", "ground", "night")
WEIGHTS = np.array([0.24, 0.12, 0.06, 0.12, 0.08, 0.1, 0.1, 0.11, 0.07])
DIRECTIONS = ("vertical", "horizontal", "diagonal")  # of stripes; a gradient runs across them
CELLS = 16  # side of the table of random numbers that clouds and stars read
_ANGLES = np.array([0.0, math.pi / 2, math.pi / 4], dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Backgrounds:
    """B backgrounds as numbers.

    Attributes:
        kind: int [B], of `KINDS`.
        first, second: int [B], of `palette.NAMES`.
        direction: int [B], of `DIRECTIONS`.
        tint: float [B, 2, 3], the two colours in [0, 1], a little off the named ones.
        frequency: float [B], repeats per shorter side.
        offset: float [B, 2], where the pattern starts; the horizon's height is offset[:, 0].
        table: float [B, 3, CELLS, CELLS] in [0, 1].
    """

    kind: NDArray[np.int64]
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    direction: NDArray[np.int64]
    tint: NDArray[np.float32]
    frequency: NDArray[np.float32]
    offset: NDArray[np.float32]
    table: NDArray[np.float32]


def draw(
    rng: np.random.Generator, kind: NDArray[np.int64], avoid: NDArray[np.float32]
) -> Backgrounds:
    """Draws the numbers for backgrounds of given kinds.

    Args:
        rng: Source of randomness.
        kind: int [B].
        avoid: float [B, 3], the mean colour of what will stand in front: mostly kept clear of.
    """
    count = len(kind)
    ground, night = kind == KINDS.index("ground"), kind == KINDS.index("night")
    pool = rng.integers(len(palette.NAMES), size=(count, 3))
    pool[ground] = rng.choice(palette.SKIES, (int(ground.sum()), 3))
    pool[night] = rng.choice(palette.NIGHTS, (int(night.sum()), 3))
    first = _far_from(rng, pool, avoid)
    others = (first[:, None] + rng.integers(1, len(palette.NAMES), (count, 3))) % len(palette.NAMES)
    others[ground] = rng.choice(palette.GROUNDS, (int(ground.sum()), 3))
    second = _far_from(rng, others, palette.RGB[first])
    tint = palette.RGB[np.stack([first, second], 1)]
    tint = np.clip(tint + rng.normal(0, 0.015, tint.shape), 0, 1)
    offset = rng.random((count, 2))
    return Backgrounds(
        kind=kind,
        first=first,
        second=second,
        direction=rng.integers(len(DIRECTIONS), size=count),
        tint=tint.astype(np.float32),
        frequency=rng.uniform(2.5, 6.0, count).astype(np.float32),
        offset=offset.astype(np.float32),
        table=rng.random((count, 3, CELLS, CELLS), dtype=np.float32),
    )


def render(scene: Backgrounds, height: int, width: int, device: torch.device) -> Tensor:
    """The pictures, float32 [B, 3, height, width] in [0, 1]."""
    out = torch.empty(len(scene.kind), 3, height, width, device=device)
    v, u = _axes(height, width, device)
    for kind in np.unique(scene.kind):
        rows = np.flatnonzero(scene.kind == kind)
        tint = torch.from_numpy(scene.tint[rows]).to(device)[..., None, None]
        some = _Some(
            angle=_column(_ANGLES[scene.direction[rows]], device),
            frequency=_column(scene.frequency[rows], device),
            offset_x=_column(scene.offset[rows, 0], device),
            offset_y=_column(scene.offset[rows, 1], device),
            table=torch.from_numpy(scene.table[rows]).to(device),
            pixel=1 / min(height, width),
        )
        mix = _PAINTERS[KINDS[kind]](some, u, v)[:, None]
        second = torch.ones_like(tint[:, 1]) if KINDS[kind] == "night" else tint[:, 1]
        out[torch.from_numpy(rows).to(device)] = tint[:, 0] + (second - tint[:, 0]) * mix
    return out


@dataclass(frozen=True, eq=False)
class _Some:
    """Numbers of b backgrounds of one kind as [b, 1, 1] tensors; `table` is [b, 3, C, C]."""

    angle: Tensor
    frequency: Tensor
    offset_x: Tensor
    offset_y: Tensor
    table: Tensor
    pixel: float

    def edge(self, distance: Tensor) -> Tensor:
        """0 outside and 1 inside, smooth over one pixel; `distance` counts inwards."""
        return (0.5 + distance / self.pixel).clamp(0, 1)

    def along(self, u: Tensor, v: Tensor) -> Tensor:
        """Coordinate along the chosen direction."""
        return u * self.angle.cos() + v * self.angle.sin()

    def wave(self, place: Tensor, start: Tensor) -> Tensor:
        """Signed distance to the nearest edge of a square wave."""
        turn = math.pi * self.frequency
        return (turn * (place + start)).sin() / turn


def _plain(some: _Some, u: Tensor, v: Tensor) -> Tensor:
    return torch.zeros(1, device=u.device).expand(len(some.angle), *u.shape[-2:])


def _gradient(some: _Some, u: Tensor, v: Tensor) -> Tensor:
    place = some.along(u, v)
    low, high = place.amin((1, 2), keepdim=True), place.amax((1, 2), keepdim=True)
    return (place - low) / (high - low)


def _glow(some: _Some, u: Tensor, v: Tensor) -> Tensor:
    return ((u**2 + v**2).sqrt() / 0.65).clamp(max=1).expand(len(some.angle), *u.shape[-2:])


def _stripes(some: _Some, u: Tensor, v: Tensor) -> Tensor:
    return some.edge(some.wave(some.along(u, v), some.offset_x))


def _checker(some: _Some, u: Tensor, v: Tensor) -> Tensor:
    a = some.edge(some.wave(u, some.offset_x))
    b = some.edge(some.wave(v, some.offset_y))
    return a + b - 2 * a * b


def _dots(some: _Some, u: Tensor, v: Tensor) -> Tensor:
    x = (u * some.frequency + some.offset_x).remainder(1) - 0.5
    y = (v * some.frequency + some.offset_y).remainder(1) - 0.5
    return some.edge((0.28 - (x**2 + y**2).sqrt()) / some.frequency)


def _clouds(some: _Some, u: Tensor, v: Tensor) -> Tensor:
    size = u.shape[-2:]
    coarse = some.table[:, :1, :4, :4]
    fine = some.table[:, 1:2, :8, :8]
    broad, detail = (
        F.interpolate(noise, size=size, mode="bicubic", align_corners=True)[:, 0]
        for noise in (coarse, fine)
    )
    mixed = 0.7 * broad + 0.3 * detail
    return ((mixed - 0.5) * 2.2 + 0.5).clamp(0, 1)


def _ground(some: _Some, u: Tensor, v: Tensor) -> Tensor:
    horizon = 0.08 + 0.2 * some.offset_x
    return some.edge(v - horizon + torch.zeros_like(u))


def _night(some: _Some, u: Tensor, v: Tensor) -> Tensor:
    side = 7.0  # cells per shorter side, with at most one star in each
    x, y = u * side + CELLS / 2, v * side + CELLS / 2
    column, row = x.floor().long() % CELLS, y.floor().long() % CELLS
    cell = (row * CELLS + column).expand(len(some.angle), *u.shape[-2:]).flatten(1)
    jitter_x, jitter_y, bright = (
        table.gather(1, cell).view(-1, *u.shape[-2:]) for table in some.table.flatten(2).unbind(1)
    )
    x = x.remainder(1) - 0.15 - 0.7 * jitter_x
    y = y.remainder(1) - 0.15 - 0.7 * jitter_y
    radius = 0.11 * bright
    star = some.edge((radius - (x**2 + y**2).sqrt()) / side)
    return star * (bright > 0.55) * bright


_PAINTERS: dict[str, Callable[[_Some, Tensor, Tensor], Tensor]] = {
    "plain": _plain,
    "gradient": _gradient,
    "glow": _glow,
    "stripes": _stripes,
    "checker": _checker,
    "dots": _dots,
    "clouds": _clouds,
    "ground": _ground,
    "night": _night,
}


def _far_from(
    rng: np.random.Generator, pool: NDArray[np.int64], colour: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Mostly the colour of each row's pool [B, n] that is farthest from `colour` [B, 3]."""
    distance = np.linalg.norm(palette.RGB[pool] - colour[:, None], axis=-1)
    pick = np.where(rng.random(len(pool)) < 0.85, distance.argmax(1), 0)
    return pool[np.arange(len(pool)), pick]


def _axes(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    side = min(height, width)
    y = (torch.arange(height, device=device) + 0.5 - height / 2) / side
    x = (torch.arange(width, device=device) + 0.5 - width / 2) / side
    v, u = torch.meshgrid(y, x, indexing="ij")
    return v[None], u[None]


def _column(values: NDArray[np.float32], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)[:, None, None]
