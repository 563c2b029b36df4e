"""Where tokens stand: the latent grid, the text spans around it, permutations of the sequence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenGrid:
    """A grid of image or video tokens, flattened frame-major, then by row, then by column.

    Args:
        frames: latent frames after temporal patching; 1 for an image.
        height: token rows.
        width: token columns.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        for axis, extent in zip(("frames", "height", "width"), self.shape, strict=True):
            if not isinstance(extent, int) or extent < 1:
                raise ValueError(
                    f"Expected {axis} of a token grid to be an integer of at least 1, "
                    f"got {extent!r}."
                )

    @classmethod
    def parse(cls, text: str) -> TokenGrid:
        """Reads `"21x45x80"` (frames x height x width) or `"64x64"` (height x width)."""
        extents = text.lower().split("x")
        if len(extents) not in (2, 3) or not all(re.fullmatch(r"\d+", e) for e in extents):
            raise ValueError(
                "Expected a token grid such as 21x45x80 (frames x height x width) or 64x64, "
                f"got {text!r}."
            )
        return cls(*[1] * (3 - len(extents)), *map(int, extents))

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.frames, self.height, self.width)

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.frames * self.height * self.width

    def coordinates(self, device: torch.device | str | None = None) -> Tensor:
        """int64 `[length, 3]`: frame, row and column of every token in sequence order."""
        axes = [torch.arange(extent, device=device) for extent in self.shape]
        return torch.cartesian_prod(*axes).view(-1, 3)

    def __str__(self) -> str:
        return "x".join(map(str, self.shape))


@dataclass(frozen=True)
class TextSpan:
    """A run of text tokens inside a joint attention sequence.

    Args:
        length: tokens of the span, padding included.
        valid: how many leading tokens are real, one number per batch entry; `None` when all are.
            Padding tokens are never read as keys.
    """

    length: int
    valid: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ValueError(f"Expected a text length of at least 0, got {self.length}.")
        if self.valid is not None and any(not 0 <= v <= self.length for v in self.valid):
            raise ValueError(
                f"Expected valid text lengths between 0 and {self.length}, got {self.valid}."
            )
        if self.valid is not None and all(v == self.length for v in self.valid):
            object.__setattr__(self, "valid", None)  # one meaning, one key in the plan cache


Segment: TypeAlias = TokenGrid | TextSpan


@dataclass(frozen=True)
class TokenLayout:
    """The order of text and image segments in an attention sequence.

    The first grid is the picture being made; further grids (reference images) and all text are
    *context*: every query reads them and they read everything.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        segments = tuple(s for s in self.segments if s.length)
        object.__setattr__(self, "segments", segments)
        if not any(isinstance(s, TokenGrid) for s in segments):
            raise ValueError("Expected a token layout with at least one grid, got only text.")
        batches = {len(s.valid) for s in self.text if s.valid is not None}
        if len(batches) > 1:
            raise ValueError(f"Expected one batch size in all text spans, got {sorted(batches)}.")

    @classmethod
    def of(
        cls, grid: TokenGrid, text_first: int = 0, text_last: int = 0, *more: TokenGrid
    ) -> TokenLayout:
        """A grid with text before or after it and, behind the grid, reference images."""
        return cls((TextSpan(text_first), grid, *more, TextSpan(text_last)))

    @property
    def length(self) -> int:
        return sum(s.length for s in self.segments)

    @property
    def grid(self) -> TokenGrid:
        return next(s for s in self.segments if isinstance(s, TokenGrid))

    @property
    def text(self) -> tuple[TextSpan, ...]:
        return tuple(s for s in self.segments if isinstance(s, TextSpan))

    @property
    def grid_start(self) -> int:
        """Position of the first token of the picture in the sequence."""
        return next(start for start, s in self.spans() if isinstance(s, TokenGrid))

    @property
    def batch(self) -> int | None:
        """Batch size that the valid lengths speak of; `None` when nothing is padded."""
        return next((len(s.valid) for s in self.text if s.valid is not None), None)

    def spans(self) -> Iterator[tuple[int, Segment]]:
        """Yields `(start, segment)` in sequence order."""
        start = 0
        for segment in self.segments:
            yield start, segment
            start += segment.length

    def without_text(self) -> TokenLayout:
        """The layout that image-only attention of the same model sees."""
        return TokenLayout(tuple(s for s in self.segments if isinstance(s, TokenGrid)))

    def valid_ranges(self, entry: int) -> list[tuple[int, int]]:
        """Ranges `[start, stop)` of the positions that are real keys for one batch entry."""
        ranges: list[tuple[int, int]] = []
        for start, segment in self.spans():
            valid = segment.length
            if isinstance(segment, TextSpan) and segment.valid is not None:
                valid = segment.valid[entry]
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], start + valid)
            else:
                ranges.append((start, start + valid))
        return [r for r in ranges if r[0] < r[1]]

    def __str__(self) -> str:
        def name(s: Segment) -> str:
            if isinstance(s, TokenGrid):
                return str(s)
            return f"text {s.length}" + (f" ({s.valid} valid)" if s.valid else "")

        return " + ".join(map(name, self.segments))


@dataclass(frozen=True, eq=False)
class Permutation:
    """A reordering of the sequence, shared by all heads or one per head.

    Args:
        index: int64 `[N]` or `[H, N]`; `index[i]` is the old position of new position `i`.
    """

    index: Tensor

    def __post_init__(self) -> None:
        if self.index.dtype != torch.int64 or self.index.ndim not in (1, 2):
            raise ValueError(
                "Expected a permutation index of dtype int64 and shape [N] or [H, N], "
                f"got {self.index.dtype} {list(self.index.shape)}."
            )
        index = self.index[0] if self.index.shape[0] == 1 and self.index.ndim == 2 else self.index
        object.__setattr__(self, "index", index.contiguous())  # kernels read it row by row

    @property
    def length(self) -> int:
        return self.index.shape[-1]

    @cached_property
    def inverse(self) -> Tensor:
        """`inverse[index[i]] == i`, same shape as `index`."""
        positions = torch.arange(self.length, device=self.index.device).expand_as(self.index)
        return torch.empty_like(self.index).scatter_(-1, self.index, positions)

    def __call__(self, x: Tensor) -> Tensor:
        """Puts `x` `[B, H, N, ...]` into the new order."""
        return _take(x, self.index)

    def undo(self, y: Tensor) -> Tensor:
        """Puts `y` back into the old order."""
        return _take(y, self.inverse)

    def then(self, other: Permutation) -> Permutation:
        """This permutation followed by `other`."""
        if other.length != self.length:
            raise ValueError(
                f"Expected a permutation of {self.length} tokens to follow {self}, got {other}."
            )
        if self.index.ndim == other.index.ndim == 1:
            return Permutation(self.index[other.index])
        first, second = torch.broadcast_tensors(self.index, other.index)
        return Permutation(first.gather(-1, second))

    def to(self, device: torch.device | str) -> Permutation:
        moved = self.index.to(device)
        return self if moved is self.index else Permutation(moved)  # keeps the computed inverse

    def check(self) -> Permutation:
        """Raises `ValueError` unless every position occurs exactly once; returns itself."""
        expected = torch.arange(self.length, device=self.index.device)
        if not bool((self.index.sort(-1).values == expected).all()):
            raise ValueError(
                f"Expected a permutation of 0..{self.length - 1}, got an index with repeated or "
                "missing positions."
            )
        return self

    def __str__(self) -> str:
        heads = "all heads" if self.index.ndim == 1 else f"{self.index.shape[0]} heads"
        return f"Permutation({self.length} tokens, {heads})"


def _take(x: Tensor, index: Tensor) -> Tensor:
    heads = index.shape[0] if index.ndim == 2 else 1
    if x.ndim < 3 or x.shape[2] != index.shape[-1] or heads not in (1, x.shape[1]):
        raise ValueError(
            f"Expected a tensor [B, H, {index.shape[-1]}, ...] with the tokens"
            + (f" and {heads} heads" if heads > 1 else "")
            + f" of the permutation, got {list(x.shape)}. Make the order for this layout."
        )
    if index.ndim == 1:
        return x.index_select(2, index)
    expanded = index.view(1, *index.shape, *[1] * (x.ndim - 3)).expand(x.shape)
    return x.gather(2, expanded)
