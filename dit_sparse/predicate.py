"""Which elements of a partial block are visible, told from coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BoxPredicate:
    """Which keys of a partial block a query reads: those inside the query's box of coordinates.

    The coordinates of a token are packed into the fields of one int32, each field one bit wider
    than its values; that spare bit is the field's *guard*. Query i reads key j iff, in every
    field, `lower[i] <= above[j]` and `below[j] <= upper[i]`, which one subtraction tests for all
    fields at once: `(above | guard) - lower` keeps every guard bit exactly when no field borrows.
    For an ordinary key `above` and `below` are the same coordinates; a key that all queries read
    (text) has all-ones in `above` and zero in `below`, so it lies in every box.

    Args:
        lower, upper: int32 `[1 or H, n_q tokens]`, packed inclusive corners of each query's box.
        above, below: int32 `[n_k tokens]`, packed key coordinates.
        guard: the int with the guard bit of every field set.
    """

    lower: Tensor
    upper: Tensor
    above: Tensor
    below: Tensor
    guard: int

    def __post_init__(self) -> None:
        make_contiguous(self, ("lower", "upper", "above", "below"))

    @property
    def heads(self) -> int:
        """How many heads are told apart."""
        return self.lower.shape[0]

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What kernels load: two tensors per query and two per key."""
        return self.lower, self.upper, self.above, self.below

    def mask(self, head: int, q: slice | Tensor, k: slice | Tensor) -> Tensor:
        """bool `[queries, keys]` for one head and the given positions."""
        head = head % self.heads
        return self.inside(
            self.lower[head, q, None], self.upper[head, q, None], self.above[k], self.below[k]
        )

    def inside(self, lower: Tensor, upper: Tensor, above: Tensor, below: Tensor) -> Tensor:
        """The comparison itself, on values of `operands` that broadcast."""
        fits = ((above | self.guard) - lower) & ((upper | self.guard) - below)
        return (fits & self.guard) == self.guard

    def by_block(self, starts: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """`above` and `below` with a row for each block of keys, int32 `[n_k, size]`.

        What a short block lacks is filled with a key that lies in no box.

        Args:
            starts: `[n_k + 1]`, first key of each block, and the end.
            size: the most keys of a block.
        """
        within = torch.arange(size, device=starts.device)
        real = within < starts.diff()[:, None]
        token = (starts[:-1, None] + within) * real
        above, below = self.above[token] * real, self.below[token]
        return above, torch.where(real, below, self.guard).int()

    def to(self, device: torch.device | str) -> BoxPredicate:
        lower, upper, above, below = (t.to(device) for t in self.operands)
        return BoxPredicate(lower, upper, above, below, self.guard)


@dataclass(frozen=True, eq=False)
class DiskPredicate:
    """Which keys of a partial block a query reads: those inside a circle around the query.

    Query i reads key j iff `dy**2 + dx**2 < limit[i]`, strictly, with the differences of their rows
    and columns (CLEAR, arXiv 2412.16112), or if the key is one that all queries read (text). Frames
    play no part: on a video the circle is a cylinder.

    Args:
        centre: int32 `[1 or H, n_q tokens]`, row * 65,536 + column of each query.
        limit: int32, same shape, squared radius, above 0.
        key: int32 `[n_k tokens]`, row * 65,536 + column of each key; -1 for one that all read.
    """

    centre: Tensor
    limit: Tensor
    key: Tensor

    def __post_init__(self) -> None:
        make_contiguous(self, ("centre", "limit", "key"))

    @property
    def heads(self) -> int:
        """How many heads are told apart."""
        return self.centre.shape[0]

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What kernels load: two tensors per query and two per key, here twice the same."""
        return self.centre, self.limit, self.key, self.key

    @property
    def guard(self) -> int:
        """Nothing is packed so that it could borrow."""
        return 0

    def mask(self, head: int, q: slice | Tensor, k: slice | Tensor) -> Tensor:
        """bool `[queries, keys]` for one head and the given positions."""
        head = head % self.heads
        return self.inside(
            self.centre[head, q, None], self.limit[head, q, None], self.key[k], self.key[k]
        )

    def inside(self, centre: Tensor, limit: Tensor, key: Tensor, _: Tensor) -> Tensor:
        """The comparison itself, on values of `operands` that broadcast."""
        dy, dx = (key >> 16) - (centre >> 16), (key & 0xFFFF) - (centre & 0xFFFF)
        return (dy * dy + dx * dx < limit) | (key < 0)

    def to(self, device: torch.device | str) -> DiskPredicate:
        return DiskPredicate(self.centre.to(device), self.limit.to(device), self.key.to(device))


Predicate: TypeAlias = BoxPredicate | DiskPredicate


def make_contiguous(record: object, names: tuple[str, ...]) -> None:
    """Kernels read these tensors row by row; nothing happens to those that are so already."""
    for name in names:
        object.__setattr__(record, name, getattr(record, name).contiguous())
