"""Which keys a query reads along one axis of the grid: windows as intervals.

All windows here share one form. The positions of an axis are put into an order of *places*, in
which the keys of every query are one interval, and the ends of the intervals never fall from one
place to the next. Dilation and rolling are that order; stride, borders and causality are the ends.
Everything else (tiles, lists, masks) needs no more than `Intervals`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

#: What a window does at the borders of its axis: move inside, or lose the keys that are outside.
Borders = Literal["inward", "truncated"]


@dataclass(frozen=True, eq=False)
class Intervals:
    """The windows of one axis of L positions.

    Args:
        position: int64 `[L]`, the position that stands at each place.
        low, high: int64 `[L]`, first and last visible place of the query at each place; both
            never fall.
        runs: lengths of stretches of places that no window crosses, such as dilation groups.
    """

    position: Tensor
    low: Tensor
    high: Tensor
    runs: tuple[int, ...]

    def mask(self) -> Tensor:
        """bool `[L, L]`: which query position reads which key position; for tests and pictures."""
        place = torch.empty_like(self.position)
        place[self.position] = torch.arange(len(place))
        low, high = self.low[place], self.high[place]
        return (low[:, None] <= place) & (place <= high[:, None])


@runtime_checkable
class Axis(Protocol):
    """A rule that gives windows to one axis; implementations are frozen and hashable."""

    @property
    def extent(self) -> int: ...

    def intervals(self) -> Intervals: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Neighbourhood:
    """Generalized neighbourhood attention along one axis (arXiv 2504.16922, 2204.07143).

    Positions with the same remainder by the dilation d form a group of their own, in which
    everything happens. Groups of `stride` queries share the window of their leader: the middle
    one, the right of two; under causality the last one. A window of w keys reaches w // 2 to the
    left of its leader, so an even one is heavier on the left; under causality it ends at each
    query itself.

    Args:
        extent: positions of the axis.
        window: keys of a window.
        stride: queries that share a window, at most `window`.
        dilation: distance of neighbouring keys; `window * dilation` is at most `extent`.
        causal: whether keys behind the query are hidden; windows are then cut at the near border.
        borders: `"inward"` moves windows inside, so that every query reads `window` keys;
            `"truncated"` cuts them.
        axis: its name, for the sentences.

    Raises:
        ValueError: numbers out of these ranges.
    """

    extent: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False
    borders: Borders = "inward"
    axis: str = field(default="its axis", compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("extent", "window", "stride", "dilation"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"Expected {'an' if name == 'extent' else 'a'} {name} along {self.axis} of at "
                    f"least 1, an integer, got {value!r}."
                )
        if self.window * self.dilation > self.extent:
            raise ValueError(
                f"Expected window * dilation along {self.axis} of at most {self.extent}, its "
                f"extent, got {self.window} * {self.dilation}."
            )
        if self.stride > self.window:
            raise ValueError(
                f"Expected a stride along {self.axis} of at most {self.window}, its window, got "
                f"{self.stride}."
            )
        if self.borders not in get_args(Borders):
            raise ValueError(
                f"Expected borders among {', '.join(get_args(Borders))}, got {self.borders!r}."
            )

    def intervals(self) -> Intervals:
        # Groups before extent % dilation are one longer where the dilation does not divide.
        lengths = (self.extent - torch.arange(self.dilation) + self.dilation - 1) // self.dilation
        group = torch.arange(self.dilation).repeat_interleave(lengths)
        first = (lengths.cumsum(0) - lengths)[group]
        p, length = torch.arange(self.extent) - first, lengths[group]
        low, high = self._ends(p, length)
        position = group + self.dilation * p
        return Intervals(position, first + low, first + high, tuple(lengths.tolist()))

    def _ends(self, p: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """First and last key of positions p inside groups of these lengths."""
        w, s = self.window, self.stride
        if self.causal:
            leader = torch.minimum(p // s * s + s - 1, length - 1)
            return (leader - w + 1).clamp(min=0), p
        leader = torch.minimum(p // s * s + s // 2, length - 1)
        low = leader - w // 2
        if self.borders == "truncated":
            return low.clamp(min=0), torch.minimum(low + w, length) - 1
        low = torch.minimum(low.clamp(min=0), length - w)
        return low, low + w - 1


@dataclass(frozen=True)
class Rolled:
    """An axis whose positions are rolled before windows are laid, and back afterwards.

    Place r holds position (r + shift) mod extent, as `torch.roll(x, -shift)` has it, so windows
    wrap around: shifted windows without a region mask (MSW-MSA of HiDiffusion, arXiv 2311.17528).
    """

    axis: Neighbourhood
    shift: int

    @property
    def extent(self) -> int:
        return self.axis.extent

    def intervals(self) -> Intervals:
        inner = self.axis.intervals()
        position = (inner.position + self.shift) % self.extent
        return Intervals(position, inner.low, inner.high, inner.runs)


@dataclass(frozen=True)
class Partition:
    """Disjoint windows that start at `shift` modulo their size; those at the borders are shorter.

    With a shift of half a window these are Swin's shifted windows (arXiv 2103.14030): the region
    mask takes from each rolled window what came around the border.
    """

    extent: int
    window: int
    shift: int = 0

    def intervals(self) -> Intervals:
        place = torch.arange(self.extent)
        first = (place - self.shift) // self.window * self.window + self.shift
        low, high = first.clamp(min=0), (first + self.window).clamp(max=self.extent) - 1
        return Intervals(place, low, high, tuple(low.unique(return_counts=True)[1].tolist()))


@dataclass(frozen=True)
class SlidingTiles:
    """Sliding tile attention along one axis (arXiv 2502.04507): whole tiles, moved inwards.

    The queries of tile u of T read the tiles clamp(u, r, T - 1 - r) - r to + r with
    r = count // 2, so an even count reads as many as the next odd one, and T or more read all.

    Args:
        extent: positions of the axis; the last tile is shorter where tiles do not divide it.
        tile: positions of a tile.
        count: tiles of a window.
    """

    extent: int
    tile: int
    count: int

    def intervals(self) -> Intervals:
        place = torch.arange(self.extent)
        tiles, reach = -(-self.extent // self.tile), self.count // 2
        centre = (place // self.tile).clamp(reach, max(reach, tiles - 1 - reach))
        low = (centre - reach) * self.tile
        high = ((centre + reach + 1) * self.tile).clamp(max=self.extent) - 1
        return Intervals(place, low, high, (self.extent,))


@dataclass(frozen=True)
class Within:
    """Every query reads the keys at most `reach` away; fewer at the borders."""

    extent: int
    reach: int

    def intervals(self) -> Intervals:
        place = torch.arange(self.extent)
        low, high = place - self.reach, place + self.reach
        return Intervals(place, low.clamp(min=0), high.clamp(max=self.extent - 1), (self.extent,))


def whole(extent: int) -> Neighbourhood:
    """An axis along which everything is visible."""
    return Neighbourhood(extent, extent)
