"""A recipe of stock image classes: `FluxPipeline`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from scripts.training.flux_denoiser import FluxDenoiser, blind_far_tokens, close_gates
from scripts.training.recipe import Card, Pipeline, Size
from scripts.training.stage import Stage
from scripts.training.times import time_shift

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from transformers import PreTrainedTokenizerFast

_PIXELS_PER_TOKEN = 4


@dataclass(frozen=True)
class ImageRecipe:
    """Arguments of the stock classes.

    Args:
        name: under which the checkpoint remembers it.
        vae: of `AutoencoderKL`.
        transformer: of `FluxTransformer2DModel`.
        clip: of `CLIPTextConfig`, without the vocabulary.
        t5: of `T5Config`, without the vocabulary.
        vocabulary: tokens of the tokenizer.
        stages, card, limit_bytes, compiles, smallest: see `recipe.Recipe`.
    """

    name: str
    vae: Mapping[str, Any]
    transformer: Mapping[str, Any]
    clip: Mapping[str, Any]
    t5: Mapping[str, Any]
    vocabulary: int
    stages: Mapping[str, Stage]
    card: Card
    limit_bytes: int = 22_000_000
    compiles: bool = True
    smallest: Size = (1, 64, 64)

    @property
    def size_rule(self) -> str:
        return f"1 frame and sides that are multiples of {_PIXELS_PER_TOKEN}"

    def fits(self, size: Size) -> bool:
        frames, height, width = size
        return frames == 1 and height % _PIXELS_PER_TOKEN == 0 and width % _PIXELS_PER_TOKEN == 0

    @property
    def patch(self) -> int:
        return 4

    def tokens(self, frames: int, height: int, width: int) -> int:
        return frames * (height // _PIXELS_PER_TOKEN) * (width // _PIXELS_PER_TOKEN)

    def with_channels(self, channels: int) -> ImageRecipe:
        return replace(
            self,
            vae={**self.vae, "latent_channels": channels},
            transformer={**self.transformer, "in_channels": 4 * channels},
        )

    def with_statistics(self, mean: Sequence[float], std: Sequence[float]) -> ImageRecipe:
        """`AutoencoderKL` declares one mean and one deviation for all channels."""
        middle = fmean(mean)
        spread = math.sqrt(fmean(s**2 + (m - middle) ** 2 for m, s in zip(mean, std, strict=True)))
        recipe = self.with_channels(len(mean))
        measured = {"shift_factor": middle, "scaling_factor": 1 / spread}
        return replace(recipe, vae={**recipe.vae, **measured})

    def statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        return [self.vae["shift_factor"]], [1 / self.vae["scaling_factor"]]

    def for_vae(self, video: Tensor) -> Tensor:
        return video.squeeze(2)

    def encode(self, vae: Any, pictures: Tensor) -> DiagonalGaussianDistribution:
        return vae.encode(pictures).latent_dist

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        return vae.decode(latents).sample

    def build_vae(self) -> Any:
        from diffusers import AutoencoderKL

        return AutoencoderKL(**self.vae)

    def build_denoiser(self) -> nn.Module:
        from diffusers import FluxTransformer2DModel
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

        transformer = FluxTransformer2DModel(**self.transformer)
        close_gates(transformer)
        clip = CLIPTextModel(CLIPTextConfig(vocab_size=self.vocabulary, **self.clip))
        t5 = T5EncoderModel(T5Config(vocab_size=self.vocabulary, **self.t5))
        blind_far_tokens(t5)
        return FluxDenoiser(clip, t5, transformer)

    def build_pipeline(
        self, vae: Any, denoiser: Any, tokenizer: PreTrainedTokenizerFast
    ) -> Pipeline:
        from diffusers import FluxPipeline

        return FluxPipeline(
            scheduler=build_scheduler(),
            vae=vae,
            text_encoder=denoiser.text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=denoiser.text_encoder_2,
            tokenizer_2=tokenizer,
            transformer=denoiser.transformer,
        )

    def build_scheduler(self, size: Size) -> Any:
        return build_scheduler()  # it is told the size by the pipeline

    def call(self, prompts: Sequence[str], size: Size, *, distilled: bool) -> dict[str, Any]:
        _, height, width = size
        twice = {
            "negative_prompt": [""] * len(prompts),
            "true_cfg_scale": 4.0,
            "guidance_scale": 1.0,
        }
        guided = {"guidance_scale": 3.5} if distilled else twice
        return {"prompt": list(prompts), "height": height, "width": width, **guided}

    def clips(self, result: Any) -> list[np.ndarray]:
        return list(result.images[:, None])


def build_scheduler() -> Any:
    """Euler steps, shifted towards noise as `FluxPipeline` does it: the more, the more tokens.

    The logarithm of the shift is linear in the number of tokens there, but grows with the logarithm
    of that number in `time_shift`, which training follows. The two agree at 4,096 tokens
    (256x256) and 16,384 (512x512). At 1,024 tokens sampling shifts by 3.4 where training did by
    2.4, at 9,216 by 4.6 instead of 5.0.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    least, most = 4096, 16_384
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_image_seq_len=least,
        max_image_seq_len=most,
        base_shift=math.log(time_shift(least)),
        max_shift=math.log(time_shift(most)),
    )
