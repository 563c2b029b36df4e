"""What the trained models are made of: stock diffusers and transformers classes, as data.

The video VAE halves time and quarters height and width. A temporal factor of 1 would be simpler,
but `WanPipeline.__call__` then turns every frame count n into n + 1 (it tests `n % factor != 1`).
At 128x128 and 49 frames the transformer sees 25 x 16 x 16 = 6400 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Tokens of a caption in training, end token included.
TEXT_LENGTH = 64

#: Text tokens that the stock pipeline makes by default; those after the caption are zeros.
PIPELINE_TEXT_LENGTH = 512


@dataclass(frozen=True)
class Recipe:
    """Arguments of the stock classes.

    Args:
        name: under which the checkpoint remembers it.
        vae: of `AutoencoderKLWan`.
        transformer: of `WanTransformer3DModel`.
        text: of `UMT5Config`, without the vocabulary.
        vocabulary: tokens of the tokenizer.
        shift: of the sampling schedule towards noise.
    """

    name: str
    vae: Mapping[str, Any]
    transformer: Mapping[str, Any]
    text: Mapping[str, Any]
    vocabulary: int
    shift: float = 4.0

    @property
    def frames_per_latent(self) -> int:
        return self.vae["scale_factor_temporal"]

    @property
    def pixels_per_latent(self) -> int:
        return self.vae["scale_factor_spatial"]

    def build_vae(self) -> Any:
        """A fresh `AutoencoderKLWan`."""
        from diffusers import AutoencoderKLWan

        return AutoencoderKLWan(**self.vae)

    def build_transformer(self) -> Any:
        """A fresh `WanTransformer3DModel`."""
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel(**self.transformer)

    def build_text_encoder(self) -> Any:
        """A fresh `UMT5EncoderModel`."""
        from transformers import UMT5Config, UMT5EncoderModel

        return UMT5EncoderModel(UMT5Config(vocab_size=self.vocabulary, **self.text))

    def build_scheduler(self) -> Any:
        """The scheduler that is shipped: UniPC over the flow's noise levels, as Wan's is."""
        from diffusers import UniPCMultistepScheduler

        return UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=self.shift
        )

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Transformer tokens of a clip."""
        latents = (frames - 1) // self.frames_per_latent + 1
        unit = self.pixels_per_latent * self.transformer["patch_size"][1]
        return latents * (height // unit) * (width // unit)


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
TINY_VIDEO = Recipe(
    name="tiny-video",
    vae=_vae(32, 8),
    transformer=_transformer(layers=8, heads=5, ffn=768, channels=8, text=256),
    text=_text(layers=2, dim=256),
    vocabulary=3072,
)

#: For tests and dry runs on a CPU.
TOY = Recipe(
    name="toy",
    vae=_vae(8, 4),
    transformer=_transformer(layers=2, heads=1, ffn=64, channels=4, text=64),
    text=_text(layers=1, dim=64),
    vocabulary=400,
)

RECIPES = {recipe.name: recipe for recipe in (TINY_VIDEO, TOY)}
