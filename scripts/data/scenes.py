"""What a batch shows, drawn on the host: which sprites, how they move, over what."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scripts.data import backgrounds, motions
from scripts.data.backgrounds import Backgrounds
from scripts.data.motions import ACTIONS, Motions
from scripts.data.names import Design
from scripts.data.sprites import Sprites

SPLITS = ("train", "compositions", "held_out")
MOST = 3  # sprites in one picture
COUNT_WEIGHTS = (0.8, 0.15, 0.05)
PEOPLE = 0.2  # largest share of people and hands, which look alike
FRAMINGS = ("usual", "close-up", "small")
Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Scenes:
    """B scenes of up to `MOST` sprites; column k of [B, MOST] is the k-th sprite.

    Attributes:
        count: int [B], sprites in the scene; columns from there on are not shown.
        sprite: int [B, MOST], rows of the sprites.
        moves: Motions of the B * MOST sprites, scene by scene.
        mirror: bool [B, MOST].
        start, playback: float [B, MOST], the clip's own animation: where in its loop it starts, in
            [0, 1), and how many stored frames it advances in one frame.
        framing: int [B], of `FRAMINGS`.
        stacked: Whether several sprites stand above each other, not side by side.
        background: The backgrounds.
    """

    count: Ints
    sprite: Ints
    moves: Motions
    mirror: NDArray[np.bool_]
    start: Floats
    playback: Floats
    framing: Ints
    stacked: bool
    background: Backgrounds

    def action(self, scene: int, column: int) -> str:
        """Name of a sprite's action."""
        return ACTIONS[self.moves.action[scene * MOST + column]]

    def stored_frames(self, frames: int, loop: int) -> Ints:
        """int [B, MOST, frames]: which of `loop` stored frames is shown when."""
        shown = self.start[..., None] * loop + self.playback[..., None] * np.arange(frames)
        return shown.astype(np.int64) % loop


@dataclass(frozen=True, eq=False)
class Cast:
    """The sprites of one split, by design.

    Attributes:
        order: int [n], rows of the split's sprites, those of one design together.
        design: int [d], the designs, as indices into `Sprites.designs`.
        begin, size: int [d], where in `order` a design's sprites begin, and how many there are.
        weights: float [d], how often a design is drawn.
        held: int [d, actions], the background kind whose composition with a design and an action
            is held out.
    """

    order: Ints
    design: Ints
    begin: Ints
    size: Ints
    weights: NDArray[np.float64]
    held: Ints

    def draw(self, rng: np.random.Generator, batch: int) -> tuple[Ints, Ints]:
        """(row of the sprite, position of its design in `design`), both [batch, MOST].

        Designs differ within a scene as far as there are enough of them.
        """
        shape = (batch, MOST)
        pick = rng.choice(len(self.design), shape, p=self.weights)
        distinct = min(MOST, len(self.design))
        again = np.full(batch, True)
        while again.any():
            again = (np.diff(np.sort(pick[:, :distinct])) == 0).any(1)
            pick[again] = rng.choice(len(self.design), (int(again.sum()), MOST), p=self.weights)
        within = (rng.random(shape) * self.size[pick]).astype(np.int64)
        return self.order[self.begin[pick] + within], pick


def rows_of(sprites: Sprites, split: str) -> Tensor:
    """bool [n]: which sprites a split shows. Raises ValueError as `cast` does."""
    if split not in SPLITS:
        raise ValueError(f"Expected split to be one of {SPLITS}, got {split!r}. Name one of them.")
    rows = sprites.held_out == (split == "held_out")
    if not rows.any():
        raise ValueError(f"Expected sprites in the split {split!r}, got none. Load a complete set.")
    return rows


def cast(sprites: Sprites, split: str) -> Cast:
    """The sprites of a split.

    Args:
        sprites: The whole set.
        split: "train" and "compositions" take the seen designs, "held_out" the others.

    Raises:
        ValueError: unknown split, or one without sprites.
    """
    rows = np.flatnonzero(rows_of(sprites, split).numpy())
    design_of = sprites.design_of.numpy()
    order = rows[np.argsort(design_of[rows], kind="stable")]
    design, begin, size = np.unique(design_of[order], return_index=True, return_counts=True)
    shown = [sprites.designs[i] for i in design]
    return Cast(order, design, begin, size, _weights(shown), _held_out_backgrounds(shown))


def draw_scenes(
    rng: np.random.Generator,
    actors: Cast,
    split: str,
    sprites: Sprites,
    colours: Floats,
    batch: int,
    frames: int,
    height: int,
    width: int,
) -> Scenes:
    """Draws a batch of scenes of a split for pictures of a size.

    Args:
        rng: Source of randomness.
        actors: The split's cast.
        split: "train" draws none of the held-out compositions, "compositions" nothing else.
        sprites: The whole set.
        colours: float [n, 3], mean colour of each sprite.
        batch, frames, height, width: Size of the batch.
    """
    half = half_sides(height, width)
    count = 1 + rng.choice(MOST, batch, p=COUNT_WEIGHTS)
    count = np.minimum(count, len(actors.design))
    sprite, pick = actors.draw(rng, batch)
    action = _actions(rng, count, frames)
    framing = np.where(count > 1, 0, rng.choice(3, batch, p=(0.74, 0.1, 0.16)))
    framing[(framing == 1) & ~np.isin(action[:, 0], [0, ACTIONS.index("swing")])] = 0
    stacked = height > 1.2 * width
    scale, room, centre = _places(rng, count, framing, action, half, stacked)
    flat = (batch * MOST, 2)
    moves = motions.draw(
        rng, action.reshape(-1), scale.reshape(-1), room.reshape(flat), centre.reshape(flat)
    )
    may_mirror = np.array([design.mirror for design in sprites.designs])[actors.design[pick]]
    kind = _background_kinds(rng, actors.held[pick[:, 0], action[:, 0]], split)
    return Scenes(
        count=count,
        sprite=sprite,
        moves=moves,
        mirror=may_mirror & (rng.random(sprite.shape) < 0.5),
        start=rng.random(sprite.shape, dtype=np.float32),
        playback=rng.choice(np.array([0.75, 1, 1, 1, 1.5, 2], np.float32), sprite.shape),
        framing=framing,
        stacked=stacked,
        background=backgrounds.draw(rng, kind, colours[sprite[:, 0]]),
    )


def half_sides(height: int, width: int) -> Floats:
    """Half the width and half the height in units of the shorter side, float32 [2]."""
    return np.array([width, height], np.float32) / np.float32(2 * min(height, width))


def _weights(designs: Sequence[Design]) -> NDArray[np.float64]:
    """Equal for all phrases, but people and hands get no more than `PEOPLE` in all."""
    people = np.array([design.group == "people-body" for design in designs])
    alike = Counter(design.phrase for design in designs)  # two dozen are called "a clock"
    weights = np.array([1 / alike[design.phrase] for design in designs])
    share = weights[people].sum() / weights.sum()
    if PEOPLE < share < 1:
        weights[people] *= PEOPLE / (1 - PEOPLE) * (1 - share) / share
    return weights / weights.sum()


def _held_out_backgrounds(designs: Sequence[Design]) -> Ints:
    """For each design and action the background kind that SHA-256 of their names points at."""

    def held(text: str) -> int:
        digest = hashlib.sha256(text.encode()).digest()
        return int.from_bytes(digest[:8], "big") % len(backgrounds.KINDS)

    return np.array([[held(f"{d.name}|{action}") for action in ACTIONS] for d in designs])


def _background_kinds(rng: np.random.Generator, held: Ints, split: str) -> Ints:
    if split == "compositions":
        return held
    weights = np.tile(backgrounds.WEIGHTS, (len(held), 1))
    if split == "train":
        weights[np.arange(len(held)), held] = 0
    edges = np.cumsum(weights, 1)
    return (rng.random((len(held), 1)) * edges[:, -1:] > edges).sum(1)


def _actions(rng: np.random.Generator, count: Ints, frames: int) -> Ints:
    """int [B, MOST]; several sprites act in place, most often all alike."""
    shape = (len(count), MOST)
    if frames == 1:
        return np.zeros(shape, dtype=np.int64)
    short = frames < motions.FEWEST_FRAMES
    weights = motions.WEIGHTS * [not (short and name in motions.PERIODIC) for name in ACTIONS]
    single = rng.choice(len(ACTIONS), shape, p=weights / weights.sum())
    in_place = weights * [name in motions.IN_PLACE for name in ACTIONS]
    several = rng.choice(len(ACTIONS), shape, p=in_place / in_place.sum())
    alike = rng.random((len(count), 1)) < 0.6
    several = np.where(alike, several[:, :1], several)
    return np.where(count[:, None] > 1, several, single)


def _places(
    rng: np.random.Generator,
    count: Ints,
    framing: Ints,
    action: Ints,
    half: Floats,
    stacked: bool,
) -> tuple[NDArray, NDArray, NDArray]:
    """(scale [B, MOST], half sides of each sprite's region and its middle, both [B, MOST, 2])."""
    batch = len(count)
    axis = 1 if stacked else 0
    centre = np.zeros((batch, MOST, 2))
    room = np.broadcast_to(half, (batch, MOST, 2)).copy()
    slot = 2 * half[axis] / count[:, None]
    centre[..., axis] = slot * (np.arange(MOST) + 0.5) - half[axis]
    room[..., axis] = slot / 2
    largest = np.minimum(2 * room.min(-1), 1)
    low = np.array([0.62, 1.15, 0.3])[framing][:, None]
    high = np.array([0.95, 1.5, 0.42])[framing][:, None]
    scale = largest * rng.uniform(low, high, (batch, MOST))
    scale = np.where(count[:, None] > 1, largest * rng.uniform(0.95, 1.2, (batch, MOST)), scale)
    travels = np.isin(action, [ACTIONS.index(name) for name in motions.TRAVELS])
    scale = np.where(travels & (framing[:, None] == 0), 0.75 * scale, scale)
    return scale, room, centre
