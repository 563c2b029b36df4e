"""CogVideoX 1.0 and 1.5, and ConsisID, which shares its blocks: text first, then video tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.pipelines.family import Family, Hoist, Tokens


def layout(transformer: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
    """Latents `[B, F, C, H, W]`, frames before channels; only 1.5 has patches in time."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    config: Any = transformer.config
    patch, patch_t = config.patch_size, config.get("patch_size_t") or 1
    grid = TokenGrid(frames // patch_t, height // patch, width // patch)
    return TokenLayout.of(grid, text_first=arguments["encoder_hidden_states"].shape[1])


FAMILY = Family(
    name="cogvideox",
    transformers=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    attention=r"transformer_blocks\.\d+\.attn1",
    processors=("CogVideoXAttnProcessor2_0",),
    layout=layout,
    pipelines=("CogVideoXPipeline",),
    model="zai-org/CogVideoX-2b",
    side=8,
    hoist=Hoist(
        arguments=(Tokens("image_rotary_emb", axis=0),),
        outputs=(Tokens("patch_embed"),),
    ),
)
