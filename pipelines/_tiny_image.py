"""Recipes of tiny image pipelines."""

from __future__ import annotations

from typing import Any

from dit_sparse.pipelines._tiny_recipe import Draw, Part, Recipe, mask


def _vae(latent_channels: int) -> Part:
    """An autoencoder of one block, whose latents have as many rows and columns as the image."""
    return Part(
        "AutoencoderKL",
        {
            "block_out_channels": (4,),
            "latent_channels": latent_channels,
            "norm_num_groups": 1,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "shift_factor": 0.0609,
        },
    )


_FLUX = Recipe(
    pipeline="FluxPipeline",
    transformer=Part(
        "FluxTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": [4, 4, 8],
        },
    ),
    vae=_vae(1),
    scheduler=Part("FlowMatchEulerDiscreteScheduler"),
    call=lambda draw: {
        "height": 16,
        "width": 24,
        "prompt_embeds": draw(1, 7, 32),
        "pooled_prompt_embeds": draw(1, 32),
    },
)

_SD3 = Recipe(
    pipeline="StableDiffusion3Pipeline",
    transformer=Part(
        "SD3Transformer2DModel",
        {
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_projection_dim": 32,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 96,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0,),
        },
    ),
    vae=_vae(4),
    scheduler=Part("FlowMatchEulerDiscreteScheduler"),
    call=lambda draw: {
        "height": 16,
        "width": 24,
        "prompt_embeds": draw(1, 7, 32),
        "negative_prompt_embeds": draw(1, 7, 32),
        "pooled_prompt_embeds": draw(1, 64),
        "negative_pooled_prompt_embeds": draw(1, 64),
    },
)


def _pixart_call(draw: Draw) -> dict[str, Any]:
    return {
        "height": 16,
        "width": 24,
        "use_resolution_binning": False,
        "negative_prompt": None,
        "prompt_embeds": draw(1, 7, 32),
        "negative_prompt_embeds": draw(1, 7, 32),
        "prompt_attention_mask": mask(7, real=5),
        "negative_prompt_attention_mask": mask(7, real=5),
    }


_PIXART = Recipe(
    pipeline="PixArtSigmaPipeline",
    transformer=Part(
        "PixArtTransformer2DModel",
        {
            "sample_size": 16,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_channels": 32,
            "in_channels": 4,
            "out_channels": 8,
            "cross_attention_dim": 32,
            "use_additional_conditions": False,
        },
    ),
    vae=_vae(4),
    scheduler=Part("DDIMScheduler"),
    call=_pixart_call,
)

_DIT = Recipe(
    pipeline="DiTPipeline",
    transformer=Part(
        "DiTTransformer2DModel",
        {
            "sample_size": 16,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "in_channels": 4,
            "out_channels": 8,
        },
    ),
    vae=_vae(4),
    scheduler=Part("DDIMScheduler"),
    call=lambda _: {"class_labels": [1], "guidance_scale": 4.0},
    output="np",
)


def _qwen_call(draw: Draw) -> dict[str, Any]:
    return {
        "height": 32,
        "width": 48,
        "true_cfg_scale": 4.0,
        "prompt_embeds": draw(1, 7, 32),
        "prompt_embeds_mask": mask(7, real=5),
        "negative_prompt_embeds": draw(1, 7, 32),
        "negative_prompt_embeds_mask": mask(7, real=7),
    }


_QWEN_IMAGE = Recipe(
    pipeline="QwenImagePipeline",
    transformer=Part(
        "QwenImageTransformer2DModel",
        {
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    vae=Part(
        "AutoencoderKLQwenImage",
        {
            "base_dim": 4,
            "z_dim": 16,
            "dim_mult": [1, 1],
            "num_res_blocks": 1,
            "temperal_downsample": [False],
        },
    ),
    scheduler=Part("FlowMatchEulerDiscreteScheduler"),
    call=_qwen_call,
)

IMAGE = {
    "flux": _FLUX,
    "sd3": _SD3,
    "pixart": _PIXART,
    "dit": _DIT,
    "qwen_image": _QWEN_IMAGE,
}
