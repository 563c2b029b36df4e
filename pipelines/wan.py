"""Wan 2.1 and 2.2, text or image to video, and VACE: video tokens alone in the self-attention.

Wan 2.2's two-transformer models are two transformers of this family. VACE runs its control branch
(`vace_blocks`) over the same grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.pipelines.family import Family, Hoist, Tokens


def layout(transformer: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
    """Latents `[B, C, F, H, W]` cut into patches; prompt and image are cross-attended."""
    extents = arguments["hidden_states"].shape[2:]
    config: Any = transformer.config
    return TokenLayout.of(
        TokenGrid(*(e // p for e, p in zip(extents, config.patch_size, strict=True)))
    )


def short_control(transformer: nn.Module, arguments: Mapping[str, Any]) -> str | None:
    """VACE pads a control video that has fewer tokens than the picture, behind its last."""
    control = arguments.get("control_hidden_states")
    if control is None or control.shape[2:] == arguments["hidden_states"].shape[2:]:
        return None
    return "control_hidden_states have another size than the video"


FAMILY = Family(
    name="wan",
    transformers=("WanTransformer3DModel", "WanVACETransformer3DModel"),
    attention=r"(vace_)?blocks\.\d+\.attn1",
    processors=("WanAttnProcessor",),
    layout=layout,
    pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    side=16,
    hoist=Hoist(
        arguments=(Tokens("timestep"),),
        outputs=(
            Tokens("rope"),
            Tokens("patch_embedding", axis=2, grid=True),
            Tokens("vace_patch_embedding", axis=2, grid=True, optional=True),
        ),
        refuses=short_control,
    ),
)
