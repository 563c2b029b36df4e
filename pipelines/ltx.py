"""LTX-Video: packed video tokens alone in the self-attention.

The long multi-prompt and the conditioned pipelines describe their tokens by coordinates instead of
a grid and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.pipelines.family import Family, Hoist, Tokens


def layout(transformer: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
    """The `num_frames`, `height` and `width` arguments, which count latents, one per token.

    Raises:
        ValueError: these arguments do not describe the sequence.
    """
    extents = tuple(arguments[name] for name in ("num_frames", "height", "width"))
    tokens = arguments["hidden_states"].shape[1]
    grid = None if None in extents else TokenGrid(*extents)
    if grid is None or grid.length != tokens:
        raise ValueError(
            f"Expected num_frames, height and width of the {tokens} latent tokens, got {extents}. "
            "Tokens placed by video_coords are not on a grid that can be read; use LTXPipeline or "
            "LTXImageToVideoPipeline."
        )
    return TokenLayout.of(grid)


FAMILY = Family(
    name="ltx",
    transformers=("LTXVideoTransformer3DModel",),
    attention=r"transformer_blocks\.\d+\.attn1",
    processors=("LTXVideoAttnProcessor",),
    layout=layout,
    pipelines=("LTXPipeline",),
    model="Lightricks/LTX-Video",
    side=32,
    hoist=Hoist(
        arguments=(Tokens("hidden_states"), Tokens("timestep")),
        outputs=(Tokens("rope"),),
    ),
)
