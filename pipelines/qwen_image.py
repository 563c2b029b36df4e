"""Qwen-Image and its Edit variants: text first, then image tokens, then those of the inputs.

Qwen-Image-Layered makes several pictures at once; all but its first count as context here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.pipelines.family import Family, Hoist, Tokens, given
from dit_sparse.pipelines.text import text_span


def layout(transformer: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
    """`img_shapes`, per batch entry a list of (frames, rows, columns) of its images, in tokens.

    Raises:
        ValueError: the shapes differ within the batch or do not add up to the sequence.
        NotALength: the mask is not a length per prompt.
    """
    tokens = arguments["hidden_states"].shape[1]
    shapes = [tuple(tuple(s) for s in _as_list(entry)) for entry in arguments["img_shapes"]]
    grids = tuple(TokenGrid(*shape) for shape in shapes[0])
    if len(set(shapes)) != 1 or sum(grid.length for grid in grids) != tokens:
        raise ValueError(
            f"Expected the same img_shapes of {tokens} image tokens for every batch entry, got "
            f"{arguments['img_shapes']}. Run pictures of different shapes apart."
        )
    text = text_span(arguments["encoder_hidden_states"], arguments["encoder_hidden_states_mask"])
    return TokenLayout((text, *grids))


def _as_list(entry: Any) -> list[Any]:
    return list(entry) if isinstance(entry, list) else [entry]


FAMILY = Family(
    name="qwen_image",
    transformers=("QwenImageTransformer2DModel",),
    attention=r"transformer_blocks\.\d+\.attn",
    processors=("QwenDoubleStreamAttnProcessor2_0",),
    layout=layout,
    pipelines=("QwenImagePipeline",),
    model="Qwen/Qwen-Image",
    makes_masks=True,
    hoist=Hoist(
        arguments=(Tokens("hidden_states"),),
        outputs=(Tokens("pos_embed", axis=0, items=(0,)),),
        refuses=given("controlnet_block_samples"),
    ),
)
