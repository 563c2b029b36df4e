"""Flux.1: text first, then packed image tokens, then those of Kontext's reference image.

Dual-stream and single-stream blocks attend over the same joint sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dit_sparse.grid import TextSpan, TokenGrid, TokenLayout
from dit_sparse.pipelines.family import Family, Hoist, Tokens, given
from dit_sparse.pipelines.memo import once_per_tensor


@once_per_tensor
def grids_of(img_ids: Tensor) -> tuple[TokenGrid, ...]:
    """The grids that position ids `[N, 3]` or `[1, N, 3]` (image, row, column) of any dtype
    speak of.

    Ids have the latents' dtype, and bfloat16 has no odd numbers above 256, so that neighbours may
    share an id and no extent can be read from a value. A row starts where the column id falls or
    the row id changes, an image where the image id changes or the row id falls.

    Raises:
        ValueError: the ids do not run through full rows of one length and equal columns.
    """
    ids = img_ids[0] if img_ids.ndim == 3 else img_ids  # the deprecated batched form
    ids = ids.detach().to("cpu", torch.float32)  # holds every half and bfloat16 value
    image, row, _ = ids.diff(dim=0).unbind(-1)
    return tuple(map(_grid, ids.split(_runs((image != 0) | (row < 0)))))


def _grid(ids: Tensor) -> TokenGrid:
    """The grid of one image's ids `[N, 3]`."""
    _, row, column = ids.diff(dim=0).unbind(-1)
    widths = _runs((row != 0) | (column < 0))
    if len(set(widths)) != 1:
        raise ValueError(
            "Expected img_ids of image rows of one length, got rows of "
            f"{sorted(set(widths))} tokens. Pass the ids that the Flux pipelines make."
        )
    columns = ids[:, 2].view(len(widths), widths[0])
    if bool((columns != columns[0]).any()) or (widths[0] > 1 and columns[0, 0] == columns[0, -1]):
        raise ValueError(
            f"Expected img_ids with the same rising columns in every row, got {len(widths)} rows "
            f"of {widths[0]} whose ids of one image are not a grid. Pass the ids that the Flux "
            "pipelines make, in float32 if they exceed 256."
        )
    return TokenGrid(1, len(widths), widths[0])


def _runs(cut: Tensor) -> list[int]:
    """Lengths of the runs of N tokens, given where `[N - 1]` one ends and the next begins."""
    edges = [0, *(cut.nonzero().flatten() + 1).tolist(), cut.numel() + 1]
    return [stop - start for start, stop in pairwise(edges)]


def layout(transformer: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
    """Packed latents `[B, N, C]` placed by `img_ids` `[N, 3]`.

    Raises:
        ValueError: the ids do not describe full grids of N tokens.
    """
    ids, tokens = arguments["img_ids"], arguments["hidden_states"].shape[1]
    grids = grids_of(ids)
    if sum(grid.length for grid in grids) != tokens:
        raise ValueError(
            f"Expected img_ids of {tokens} image tokens, got {ids.shape[-2]}. Pass one row of "
            "position ids per packed latent."
        )
    return TokenLayout((TextSpan(arguments["encoder_hidden_states"].shape[1]), *grids))


FAMILY = Family(
    name="flux",
    transformers=("FluxTransformer2DModel",),
    attention=r"(single_)?transformer_blocks\.\d+\.attn",
    processors=("FluxAttnProcessor",),
    layout=layout,
    pipelines=("FluxPipeline", "FluxKontextPipeline"),
    model="black-forest-labs/FLUX.1-dev",
    hoist=Hoist(
        arguments=(Tokens("hidden_states"), Tokens("img_ids", axis=-2)),
        refuses=given("controlnet_block_samples", "controlnet_single_block_samples"),
    ),
)
