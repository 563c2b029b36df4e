"""PixArt-Alpha and PixArt-Sigma: image tokens alone in the self-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.pipelines.family import Family, Hoist, Tokens
from dit_sparse.pipelines.lengths import NotALength


def layout(transformer: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
    """Latents `[B, C, H, W]`; the prompt is cross-attended.

    Raises:
        NotALength: a mask over image tokens, which no PixArt pipeline passes.
    """
    if arguments["attention_mask"] is not None:
        raise NotALength(
            "Expected no attention_mask over image tokens, got one. Mask the prompt with "
            "encoder_attention_mask."
        )
    height, width = arguments["hidden_states"].shape[-2:]
    config: Any = transformer.config
    return TokenLayout.of(TokenGrid(1, height // config.patch_size, width // config.patch_size))


FAMILY = Family(
    name="pixart",
    transformers=("PixArtTransformer2DModel",),
    attention=r"transformer_blocks\.\d+\.attn1",
    processors=("AttnProcessor2_0",),
    layout=layout,
    pipelines=("PixArtSigmaPipeline",),
    model="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    side=8,
    hoist=Hoist(outputs=(Tokens("pos_embed"),)),
)
