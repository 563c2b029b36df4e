"""Key masks that only say how long a prompt is, read as numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.pipelines.memo import once_per_tensor


class NotALength(ValueError):  # noqa: N818 - read as a statement about a mask
    """A key mask hides other tokens than the padding behind a prompt."""


@once_per_tensor
def text_lengths(mask: Tensor) -> tuple[int, ...] | None:
    """How many leading tokens each prompt of a key mask `[B, L]` really has.

    Reading the values waits for the device, so the answer is remembered for the tensor: a
    generation pays once per prompt and not once per forward.

    Args:
        mask: bool, integer or float; true or 1 is a real token, false or 0 is padding.

    Returns:
        One length per batch entry, or `None` when some row is not ones followed by zeros.

    Raises:
        ValueError: a mask that is not two-dimensional.
    """
    if mask.ndim != 2:
        raise ValueError(f"Expected a key mask [B, L], got {list(mask.shape)}.")
    real = mask.detach().to("cpu")
    if real.dtype != torch.bool:
        if not bool(((real == 0) | (real == 1)).all()):
            return None
        real = real == 1
    lengths = real.sum(-1)
    is_prefix = torch.equal(real, torch.arange(real.shape[1]) < lengths[:, None])
    return tuple(lengths.tolist()) if is_prefix else None
