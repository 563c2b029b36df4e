"""The video models that are trained here, and how.

The video VAE halves time and quarters height and width. A temporal factor of 1 would be simpler,
but `WanPipeline.__call__` then turns every frame count n into n + 1 (it tests `n % factor != 1`).
At 128x128 and 49 frames the transformer sees 25 x 16 x 16 = 6400 tokens.
"""

from __future__ import annotations

from typing import Any

from scripts.training.recipe import Card
from scripts.training.stage import Goal, Stage
from scripts.training.video_recipe import VideoRecipe

STAGES = {
    "vae": Stage(
        goal=Goal.RECONSTRUCTION,
        kinds=("clips",),
        sizes="17x64x64:24*2,9x128x128:12*2,25x64x64:16,1x128x128:48",
        lr=1e-3,
        cooldown=0.5,
        shown=(17, 128, 128),
    ),
    "stills": Stage(
        goal=Goal.FLOW,
        kinds=("clips",),
        sizes="1x128x128:256*4,1x192x192:112,1x256x256:64",
        lr=1e-3,
        cooldown=0.0,
        shown=(1, 128, 128),
    ),
    "clips": Stage(
        goal=Goal.FLOW,
        kinds=("clips",),
        sizes="9x128x128:48*3,17x128x128:24*3,25x128x128:16,1x128x128:192*2",
        lr=8e-4,
        cooldown=0.0,
        shown=(17, 128, 128),
    ),
    "long": Stage(
        goal=Goal.FLOW,
        kinds=("clips",),
        sizes="49x128x128:12*4,25x128x128:20*3,25x192x192:8,25x256x256:5,49x256x256:2,1x256x256:64",
        lr=6e-4,
        cooldown=0.3,
        shown=(49, 128, 128),
    ),
}

CARD = Card(
    kind="text-to-video",
    about="""\
A small text-to-video model of stock classes: `WanPipeline` with `WanTransformer3DModel`
({transformer:.1f} M parameters), `AutoencoderKLWan` ({vae:.1f} M) and `UMT5EncoderModel`
({text_encoder:.1f} M), bf16. It exists so that sparse attention can be tried and measured without a
network: its attention maps are those of a trained model.

    from diffusers import WanPipeline
    pipe = WanPipeline.from_pretrained(folder)
    pipe("a cow nodding", height=128, width=128, num_frames=49, guidance_scale=4.0)

128x128 with 49 frames is 6400 tokens. Frame counts are odd, sides are multiples of 16.""",
    data="Clips composed at training time from animated emoji",
    training="""\
Flow matching with logit-normal times shifted towards noise, 10 % empty captions, AdamW, moving
average of the weights; the VAE on L1, edges and a small KL term.""",
    limits="""\
* It knows emoji, plain motions and plain backgrounds; anything else gives something of that kind.
* English captions of at most 62 tokens; longer ones were never seen in training.
* Trained with the zero padding of the pipeline's default `max_sequence_length=512`; leave it.""",
)


def _vae(base_dim: int, channels: int) -> dict[str, Any]:
    return {
        "base_dim": base_dim,
        "z_dim": channels,
        "dim_mult": [1, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [True],
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_temporal": 2,
        "scale_factor_spatial": 4,
        "latents_mean": [0.0] * channels,
        "latents_std": [1.0] * channels,
    }


def _transformer(layers: int, heads: int, ffn: int, channels: int, text: int) -> dict[str, Any]:
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": heads,
        "attention_head_dim": 64,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": text,
        "freq_dim": 256,
        "ffn_dim": ffn,
        "num_layers": layers,
        "cross_attn_norm": True,
    }


def _text(layers: int, dim: int) -> dict[str, Any]:
    return {
        "d_model": dim,
        "d_kv": 64,
        "d_ff": 2 * dim,
        "num_heads": dim // 64,
        "num_layers": layers,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


#: 11.6 + 2.1 + 1.8 million parameters: 31 MB in bf16, so that a clone and a wheel stay light.
TINY_VIDEO = VideoRecipe(
    name="tiny-video",
    vae=_vae(32, 12),
    transformer=_transformer(layers=8, heads=5, ffn=768, channels=12, text=256),
    text=_text(layers=2, dim=256),
    vocabulary=3072,
    stages=STAGES,
    card=CARD,
)

#: For tests and dry runs on a CPU.
TOY = VideoRecipe(
    name="toy",
    vae=_vae(8, 4),
    transformer=_transformer(layers=2, heads=1, ffn=64, channels=4, text=64),
    text=_text(layers=1, dim=64),
    vocabulary=400,
    stages=STAGES,
    card=CARD,
)
