"""Stable Diffusion 3 and 3.5: image tokens, then text; 3.5 medium adds image-only attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.pipelines.family import Family, Hoist, Tokens, given


def layout(transformer: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
    """Latents `[B, C, H, W]`. The image-only `attn2` sees this layout without its text."""
    height, width = arguments["hidden_states"].shape[-2:]
    config: Any = transformer.config
    grid = TokenGrid(1, height // config.patch_size, width // config.patch_size)
    return TokenLayout.of(grid, text_last=arguments["encoder_hidden_states"].shape[1])


FAMILY = Family(
    name="sd3",
    transformers=("SD3Transformer2DModel",),
    attention=r"transformer_blocks\.\d+\.attn2?",
    processors=("JointAttnProcessor2_0",),
    layout=layout,
    pipelines=("StableDiffusion3Pipeline",),
    model="stabilityai/stable-diffusion-3.5-medium",
    hoist=Hoist(
        outputs=(Tokens("pos_embed"),),
        refuses=given("block_controlnet_hidden_states"),
    ),
)
