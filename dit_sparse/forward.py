"""One forward of a transformer as its attention calls see it, and which calls belong to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.grid import TokenLayout


@dataclass(frozen=True)
class Forward:
    """One forward of the transformer, as its pre-hook saw it.

    Args:
        layout: the sequence; `None` when it cannot be read.
        obstacle: why it cannot be read.
        step, steps: number of the denoising step and how many there are, where known.
        generation: a number that changes from one generation to the next.
        makes_masks: whether the transformer makes the masks of its attention itself, from the text
            lengths in `layout`; otherwise a mask comes from the caller and may say anything.
    """

    layout: TokenLayout | None
    obstacle: str | None = None
    step: int | None = None
    steps: int | None = None
    generation: int = 0
    makes_masks: bool = False

    @cached_property
    def image_only(self) -> TokenLayout | None:
        """The sequence of image-only attention."""
        return None if self.layout is None else self.layout.without_text()

    def layout_of(self, tokens: int) -> TokenLayout | None:
        """The layout of an attention call over this many tokens: all segments, or the image's."""
        for layout in (self.layout, self.image_only):
            if layout is not None and layout.length == tokens:
                return layout
        return None


class StockCall(NamedTuple):
    """What a stock processor asked of its attention core, besides q, k and v.

    Args:
        layer: number of the attention module.
        mask: the stock attention mask.
        scale: factor of the scores; `None` for `D ** -0.5`.
        run: the stock core on q, k, v `[B, H, N, D]`, with the mask and every stock keyword.
        obstacle: why only the stock core can run this call, or `None`.
        chosen: the user picked the dense backend, so dense calls are left to it.
    """

    layer: int
    mask: Tensor | None
    scale: float | None
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    obstacle: str | None = None
    chosen: bool = False


def place(q: Tensor, k: Tensor, call: StockCall, forward: Forward) -> TokenLayout | str:
    """The layout of a call on q, k `[B, H, N, D]`, its mask apart, or why it has none."""
    if call.obstacle is not None:
        return call.obstacle
    if forward.layout is None:
        return forward.obstacle or "The token layout is not known."
    if q.shape[:3] != k.shape[:3]:
        return (
            f"Expected self-attention with as many keys as queries, got q {list(q.shape)} and "
            f"k {list(k.shape)}."
        )
    layout = forward.layout_of(q.shape[2])
    if layout is None:
        return f"Expected the sequence {forward.layout}, got {q.shape[2]} tokens."
    if layout.batch not in (None, q.shape[0]):
        return f"Expected text lengths for a batch of {q.shape[0]}, got {layout.batch} ({layout})."
    return layout


def is_key_mask(mask: Tensor) -> bool:
    """Whether a mask has the shape `[B, 1, 1, N]`: the same for all heads and queries."""
    return mask.ndim == 4 and mask.shape[1:3] == (1, 1)


def hides_only_padding(mask: Tensor, layout: TokenLayout) -> bool:
    """Whether a mask hides the text padding that a layout knows of and nothing else.

    Waits for the device unless the shape alone says no.

    Args:
        mask: bool (true is read) or additive (0 is read, -1e4 or less is hidden).
    """
    if not is_key_mask(mask) or mask.shape[-1] != layout.length:
        return False
    seen = mask[:, 0, 0].detach().to("cpu")
    if seen.dtype != torch.bool:
        if not bool(((seen == 0) | (seen <= -1e4)).all()):
            return False
        seen = seen == 0
    expected = torch.zeros(layout.batch or 1, layout.length, dtype=torch.bool)
    for entry, row in enumerate(expected):
        for start, stop in layout.valid_ranges(entry):
            row[start:stop] = True
    return bool((seen == expected).all())
