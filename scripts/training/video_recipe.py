"""A recipe of stock video classes: `WanPipeline`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from scripts.training import whole
from scripts.training.recipe import Card, Pipeline, Size
from scripts.training.stage import Stage
from scripts.training.times import time_shift
from scripts.training.wan_denoiser import WanDenoiser, avert_from_padding, close_gates

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class VideoRecipe:
    """Arguments of the stock classes.

    Args:
        name: under which the checkpoint remembers it.
        vae: of `AutoencoderKLWan`.
        transformer: of `WanTransformer3DModel`.
        text: of `UMT5Config`, without the vocabulary.
        vocabulary: tokens of the tokenizer.
        shift: of the pipeline's sampling schedule towards noise, which does not depend on the size.
        stages, card, limit_bytes, compiles, smallest: see `recipe.Recipe`.
    """

    name: str
    vae: Mapping[str, Any]
    transformer: Mapping[str, Any]
    text: Mapping[str, Any]
    vocabulary: int
    stages: Mapping[str, Stage]
    card: Card
    shift: float = 4.0
    limit_bytes: int = 40_000_000
    compiles: bool = True
    smallest: Size = (9, 64, 64)

    @property
    def size_rule(self) -> str:
        return f"a multiple of 4 plus 1 frames and sides that are multiples of {self._unit}"

    @property
    def _unit(self) -> int:
        """Pixels of a side of a token."""
        return self.vae["scale_factor_spatial"] * self.transformer["patch_size"][1]

    def fits(self, size: Size) -> bool:
        # The stock VAE reads four frames at a time after the first and drops what is left over.
        frames, height, width = size
        return frames % 4 == 1 and height % self._unit == 0 and width % self._unit == 0

    @property
    def patch(self) -> int:
        return math.prod(self.transformer["patch_size"])

    def tokens(self, frames: int, height: int, width: int) -> int:
        latents = (frames - 1) // self.vae["scale_factor_temporal"] + 1
        return latents * (height // self._unit) * (width // self._unit)

    def with_channels(self, channels: int) -> VideoRecipe:
        neutral = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
        return replace(
            self,
            vae={**self.vae, **neutral, "z_dim": channels},
            transformer={**self.transformer, "in_channels": channels, "out_channels": channels},
        )

    def with_statistics(self, mean: Sequence[float], std: Sequence[float]) -> VideoRecipe:
        measured = {"latents_mean": list(mean), "latents_std": list(std)}
        recipe = self.with_channels(len(mean))
        return replace(recipe, vae={**recipe.vae, **measured})

    def statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        return self.vae["latents_mean"], self.vae["latents_std"]

    def for_vae(self, video: Tensor) -> Tensor:
        return video

    def encode(self, vae: Any, pictures: Tensor) -> DiagonalGaussianDistribution:
        return whole.encode(vae, pictures)

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        return whole.decode(vae, latents)

    def build_vae(self) -> Any:
        from diffusers import AutoencoderKLWan

        return AutoencoderKLWan(**self.vae)

    def build_denoiser(self) -> nn.Module:
        from diffusers import WanTransformer3DModel
        from transformers import UMT5Config, UMT5EncoderModel

        transformer = WanTransformer3DModel(**self.transformer)
        close_gates(transformer)
        avert_from_padding(transformer)
        config = UMT5Config(vocab_size=self.vocabulary, **self.text)
        return WanDenoiser(UMT5EncoderModel(config), transformer)

    def build_pipeline(
        self, vae: Any, denoiser: Any, tokenizer: PreTrainedTokenizerFast
    ) -> Pipeline:
        from diffusers import WanPipeline

        return WanPipeline(
            tokenizer=tokenizer,
            text_encoder=denoiser.text_encoder,
            vae=vae,
            scheduler=_scheduler(self.shift),
            transformer=denoiser.transformer,
        )

    def build_scheduler(self, size: Size) -> Any:
        return _scheduler(time_shift(self.tokens(*size)))

    def call(self, prompts: Sequence[str], size: Size, *, distilled: bool) -> dict[str, Any]:
        frames, height, width = size
        return {
            "prompt": list(prompts),
            "height": height,
            "width": width,
            "num_frames": frames,
            "guidance_scale": 4.0,
        }

    def clips(self, result: Any) -> list[np.ndarray]:
        return list(result.frames)


def _scheduler(shift: float) -> Any:
    """UniPC over the flow's noise levels, as Wan's own."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
