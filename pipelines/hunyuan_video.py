"""HunyuanVideo, text or image to video: video tokens, then text, always with a key mask.

The image-to-video variants use the same sequence: `latent_concat` adds channels, `token_replace`
modulates the first frame's tokens apart. The text refiner keeps its own processor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.pipelines.family import Family, Hoist, Tokens
from dit_sparse.pipelines.text import text_span


def layout(transformer: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
    """Latents `[B, C, F, H, W]`; the mask is over the text, whose length the refiner keeps.

    Raises:
        NotALength: the mask is not a length per prompt.
    """
    frames, height, width = arguments["hidden_states"].shape[2:]
    config: Any = transformer.config
    patch = config.patch_size
    grid = TokenGrid(frames // config.patch_size_t, height // patch, width // patch)
    text = text_span(arguments["encoder_hidden_states"], arguments["encoder_attention_mask"])
    return TokenLayout((grid, text))


def first_frame_apart(transformer: nn.Module, arguments: Mapping[str, Any]) -> str | None:
    """`token_replace` finds the first frame by its place in the sequence."""
    config: Any = transformer.config
    if config.image_condition_type == "token_replace":
        return "the first frame's tokens are modulated apart"
    return None


FAMILY = Family(
    name="hunyuan_video",
    transformers=("HunyuanVideoTransformer3DModel",),
    attention=r"(single_)?transformer_blocks\.\d+\.attn",
    processors=("HunyuanVideoAttnProcessor2_0",),
    layout=layout,
    pipelines=("HunyuanVideoPipeline",),
    model="hunyuanvideo-community/HunyuanVideo",
    makes_masks=True,
    side=16,
    hoist=Hoist(
        outputs=(Tokens("x_embedder"), Tokens("rope", axis=0)),
        refuses=first_frame_apart,
    ),
)
