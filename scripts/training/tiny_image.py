"""The image models that are trained here, and how.

The VAE halves height and width and the pipeline packs 2x2 latents, so a token is 4x4 pixels:
256x256, the default of a pipeline with such a VAE, is 4,096 tokens, and 512x512 is 16,384.

Like FLUX.1-dev, the model is guided in one pass. It is trained at guidance 1, and then taught what
classifier-free guidance makes of it (arXiv 2210.03142, stage one).
"""

from __future__ import annotations

from typing import Any

from scripts.training.flux_denoiser import BUCKETS, FAR
from scripts.training.image_recipe import ImageRecipe
from scripts.training.recipe import TEXT_LENGTH, Card
from scripts.training.stage import Goal, Stage

STAGES = {
    "vae": Stage(
        goal=Goal.RECONSTRUCTION,
        kinds=("clips", "images"),
        sizes="1x64x64:256,1x128x128:96*2,1x256x256:24",
        lr=1e-3,
        cooldown=0.5,
        shown=(1, 128, 128),
    ),
    "base": Stage(
        goal=Goal.FLOW,
        kinds=("images",),
        sizes="1x64x64:192*4,1x128x128:64*2,1x192x192:28",
        lr=1e-3,
        cooldown=0.0,
        shown=(1, 128, 128),
    ),
    "large": Stage(
        goal=Goal.FLOW,
        kinds=("images",),
        sizes="1x256x256:20*4,1x128x128:80*2,1x384x384:8,1x512x512:4",
        lr=6e-4,
        cooldown=0.3,
        shown=(1, 256, 256),
    ),
    "distil": Stage(
        goal=Goal.DISTILLATION,
        kinds=("images",),
        sizes="1x256x256:16*4,1x128x128:64*2,1x384x384:7,1x512x512:3",
        lr=3e-4,
        cooldown=0.3,
        shown=(1, 256, 256),
    ),
}

CARD = Card(
    kind="text-to-image",
    about="""\
A small text-to-image model of stock classes: `FluxPipeline` with `FluxTransformer2DModel`
({transformer:.1f} M parameters), `AutoencoderKL` ({vae:.1f} M), `T5EncoderModel`
({text_encoder_2:.1f} M) and `CLIPTextModel` ({text_encoder:.1f} M), bf16. It exists so that sparse
attention can be tried and measured without a network: its attention maps are those of a trained
model.

    from diffusers import FluxPipeline
    pipe = FluxPipeline.from_pretrained(folder)
    pipe("a cow over a blue background", guidance_scale=3.5)

256x256, the default, is 4,096 image tokens; 512x512 is 16,384. Sides are multiples of 4. Beside
them the transformer reads 512 text tokens.""",
    data="Pictures composed at training time from still emoji (for the VAE, animated ones too)",
    training="""\
Flow matching with logit-normal times shifted towards noise, 10 % empty captions, AdamW, moving
average of the weights; the VAE on L1, edges and a small KL term. The stage `distil` teaches the
guidance input, from 1 to 6, what classifier-free guidance makes of the model before it; without
that stage, sample with `true_cfg_scale=4, negative_prompt="", guidance_scale=1`.""",
    limits="""\
* It knows emoji and plain backgrounds; anything else gives something of that kind.
* English captions of at most 62 tokens; longer ones were never seen in training.
* Trained with the padding of the pipeline's default `max_sequence_length=512`; leave it.
* T5 sees 12 tokens to either side in each layer, so that padding is the same at every length.""",
)


def _vae(widths: tuple[int, int], channels: int) -> dict[str, Any]:
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
        "layers_per_block": 1,
        "latent_channels": channels,
        "norm_num_groups": 8,
        "sample_size": 256,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "force_upcast": False,
    }


def _transformer(double: int, single: int, heads: int, channels: int) -> dict[str, Any]:
    return {
        "in_channels": 4 * channels,
        "num_layers": double,
        "num_single_layers": single,
        "attention_head_dim": 64,
        "num_attention_heads": heads,
        "guidance_embeds": True,
        "axes_dims_rope": (8, 28, 28),
    }


def _clip(layers: int, dim: int) -> dict[str, Any]:
    return {
        "hidden_size": dim,
        "intermediate_size": 2 * dim,
        "projection_dim": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, dim // 64),
        "max_position_embeddings": TEXT_LENGTH,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }


def _t5(layers: int, dim: int) -> dict[str, Any]:
    return {
        "d_model": dim,
        "d_kv": 64,
        "d_ff": 2 * dim,
        "num_heads": dim // 64,
        "num_layers": layers,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": BUCKETS,
        "relative_attention_max_distance": FAR,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


#: 7.9 + 0.4 + 1.3 + 0.7 million parameters (transformer, VAE, T5, CLIP): 21 MB in bf16.
TINY_IMAGE = ImageRecipe(
    name="tiny-image",
    vae=_vae((32, 48), 4),
    transformer=_transformer(double=1, single=5, heads=4, channels=4)
    | {"joint_attention_dim": 192, "pooled_projection_dim": 128},
    clip=_clip(layers=2, dim=128),
    t5=_t5(layers=2, dim=192),
    vocabulary=3072,
    stages=STAGES,
    card=CARD,
)

#: For tests and dry runs on a CPU.
TOY_IMAGE = ImageRecipe(
    name="toy-image",
    vae=_vae((8, 16), 4),
    transformer=_transformer(double=1, single=1, heads=1, channels=4)
    | {"joint_attention_dim": 64, "pooled_projection_dim": 32},
    clip=_clip(layers=1, dim=32),
    t5=_t5(layers=2, dim=64),
    vocabulary=400,
    stages=STAGES,
    card=CARD,
)
