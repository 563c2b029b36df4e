"""DiT (class-conditional ImageNet): image tokens alone; the class enters through the norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.pipelines.family import Family, Hoist, Tokens


def layout(transformer: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
    """Latents `[B, C, H, W]`, which this model only takes square."""
    height, width = arguments["hidden_states"].shape[-2:]
    config: Any = transformer.config
    return TokenLayout.of(TokenGrid(1, height // config.patch_size, width // config.patch_size))


FAMILY = Family(
    name="dit",
    transformers=("DiTTransformer2DModel",),
    attention=r"transformer_blocks\.\d+\.attn1",
    processors=("AttnProcessor2_0",),
    layout=layout,
    pipelines=("DiTPipeline",),
    model="facebook/DiT-XL-2-256",
    hoist=Hoist(outputs=(Tokens("pos_embed"),), leaves="proj_out_2"),
)
