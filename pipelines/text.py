"""The text of a joint sequence whose prompts are padded to one length."""

from __future__ import annotations

from torch import Tensor

from dit_sparse.grid import TextSpan
from dit_sparse.pipelines.lengths import NotALength, text_lengths


def text_span(embeddings: Tensor, mask: Tensor | None) -> TextSpan:
    """The span of prompt embeddings `[B, L, C]` under a key mask `[B, L]` (true, 1: a real token).

    Raises:
        NotALength: the mask does more than cut padding off the end of each prompt.
    """
    length = embeddings.shape[1]
    if mask is None:
        return TextSpan(length)
    valid = text_lengths(mask)
    if valid is None:
        raise NotALength(
            "Expected a text mask of real tokens followed by padding, got another mask "
            f"{list(mask.shape)}. Pad prompts at the end, or pass no mask."
        )
    return TextSpan(length, valid)
