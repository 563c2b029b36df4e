"""Recipes of tiny video pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dit_sparse.pipelines._tiny_recipe import Draw, Part, Recipe, mask

_SIZE = {"height": 64, "width": 96, "num_frames": 9}


def _guided(length: int, dim: int) -> Callable[[Draw], dict[str, Any]]:
    """A call with a prompt and a negative prompt of `length` tokens."""

    def call(draw: Draw) -> dict[str, Any]:
        return _SIZE | {
            "prompt_embeds": draw(1, length, dim),
            "negative_prompt_embeds": draw(1, length, dim),
        }

    return call


_WAN = Recipe(
    pipeline="WanPipeline",
    transformer=Part(
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": 32,
            "freq_dim": 256,
            "ffn_dim": 32,
            "num_layers": 2,
            "cross_attn_norm": True,
        },
    ),
    vae=Part(
        "AutoencoderKLWan",
        {
            "base_dim": 3,
            "z_dim": 16,
            "dim_mult": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "temperal_downsample": [False, True, True],
        },
    ),
    scheduler=Part("FlowMatchEulerDiscreteScheduler", {"shift": 7.0}),
    call=_guided(7, 32),
)

# Of two steps, at timesteps 1000 and 875, each transformer takes one.
_WAN22 = replace(_WAN, also={"transformer_2": _WAN.transformer, "boundary_ratio": 0.9})


def _hunyuan_call(draw: Draw) -> dict[str, Any]:
    return _SIZE | {
        "prompt_embeds": draw(1, 7, 16),
        "pooled_prompt_embeds": draw(1, 8),
        "prompt_attention_mask": mask(7, real=5),
    }


_HUNYUAN_VIDEO = Recipe(
    pipeline="HunyuanVideoPipeline",
    transformer=Part(
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (4, 6, 6),
        },
    ),
    vae=Part(
        "AutoencoderKLHunyuanVideo",
        {
            "latent_channels": 4,
            "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
            "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 4,
        },
    ),
    scheduler=Part("FlowMatchEulerDiscreteScheduler", {"shift": 7.0}),
    call=_hunyuan_call,
)

_COGVIDEOX = Recipe(
    pipeline="CogVideoXPipeline",
    transformer=Part(
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 32,
            "num_layers": 2,
            "sample_width": 12,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": 7,
            "use_rotary_positional_embeddings": True,
        },
    ),
    vae=Part(
        "AutoencoderKLCogVideoX",
        {
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
            "block_out_channels": (8, 8, 8, 8),
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 2,
        },
    ),
    scheduler=Part("CogVideoXDDIMScheduler"),
    call=lambda draw: _guided(7, 32)(draw) | {"max_sequence_length": 7},
)


def _ltx_call(draw: Draw) -> dict[str, Any]:
    return _guided(7, 32)(draw) | {
        "prompt_attention_mask": mask(7, real=7),
        "negative_prompt_attention_mask": mask(7, real=7),
    }


_LTX = Recipe(
    pipeline="LTXPipeline",
    transformer=Part(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 32,
        },
    ),
    vae=Part(
        "AutoencoderKLLTXVideo",
        {
            "latent_channels": 8,
            "block_out_channels": (8, 8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8, 8),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
            "spatio_temporal_scaling": (True, True, False, False),
            "decoder_spatio_temporal_scaling": (True, True, False, False),
            "decoder_inject_noise": (False,) * 5,
            "upsample_residual": (False,) * 4,
            "upsample_factor": (1,) * 4,
            "timestep_conditioning": False,
            "patch_size": 1,
            "patch_size_t": 1,
            "encoder_causal": True,
            "decoder_causal": False,
        },
    ),
    scheduler=Part("FlowMatchEulerDiscreteScheduler"),
    call=lambda draw: _ltx_call(draw) | {"height": 32, "width": 64},
)

VIDEO = {
    "wan": _WAN,
    "wan2.2": _WAN22,
    "hunyuan_video": _HUNYUAN_VIDEO,
    "cogvideox": _COGVIDEOX,
    "ltx": _LTX,
}
