"""What a recipe is: a stock pipeline to train, described to the stages, the export and the card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from torch import Tensor, nn

from scripts.training.stage import Stage

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from transformers import PreTrainedTokenizerFast

#: Tokens of a caption in training, end token included.
TEXT_LENGTH = 64

#: Text tokens that the stock pipelines make by default; those after the caption are padding.
PIPELINE_TEXT_LENGTH = 512

# To a type checker, diffusers' own class is the stand-in for a missing torch.
Pipeline: TypeAlias = Any

#: Frames, height and width.
Size: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True)
class Card:
    """What a model card says that depends on the recipe.

    Args:
        kind: `pipeline_tag` of the card.
        about: Markdown, formatted with millions of parameters by component.
        data: what the training data are composed of.
        training: the loss of every part.
        limits: Markdown list items.
    """

    kind: str
    about: str
    data: str
    training: str
    limits: str


class Denoiser(Protocol):
    """Text encoders and transformer, a module that predicts the flow of noisy latents."""

    transformer: Any

    def __call__(self, noisy: Tensor, times: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The flow of `noisy` at noise levels `times` `[B]`, in the shape of `noisy`."""

    def shorten_text(self) -> None:
        """From now on, reads `TEXT_LENGTH` tokens as if they were the pipeline's 512."""


class Recipe(Protocol):
    """A pipeline of stock classes and how it is trained. Implementations are frozen records."""

    @property
    def name(self) -> str:
        """Under which checkpoints remember it."""

    @property
    def vocabulary(self) -> int:
        """Tokens of the tokenizer."""

    @property
    def stages(self) -> Mapping[str, Stage]:
        """Its training, in order, with defaults."""

    @property
    def limit_bytes(self) -> int:
        """What the exported folder may weigh, tokenizer and settings included."""

    @property
    def compiles(self) -> bool:
        """Whether the transformer's blocks are compiled for training on a GPU."""

    @property
    def smallest(self) -> Size:
        """A size to try an export out with."""

    @property
    def card(self) -> Card:
        """Its part of the model card."""

    @property
    def size_rule(self) -> str:
        """Which sizes it can make, to follow "Expected"."""

    def fits(self, size: Size) -> bool:
        """Whether it can make a size."""

    @property
    def patch(self) -> int:
        """Latents of a token."""

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Transformer tokens of a size, without text."""

    def with_channels(self, channels: int) -> Recipe:
        """The recipe with so many latent channels."""

    def with_statistics(self, mean: Sequence[float], std: Sequence[float]) -> Recipe:
        """The recipe whose VAE declares measured latent statistics, of every channel."""

    def statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Declared mean and deviation of the latents: of every channel, or one for all."""

    def for_vae(self, video: Tensor) -> Tensor:
        """Clips `[B, 3, F, H, W]` in the shape that the VAE takes."""

    def encode(self, vae: Any, pictures: Tensor) -> DiagonalGaussianDistribution:
        """What the VAE's `encode` gives for pictures `[B, 3, ...]`, by the fastest way."""

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """What the VAE's `decode` makes of latents, by the fastest way; it need not be clamped."""

    def build_vae(self) -> Any:
        """A fresh VAE."""

    def build_denoiser(self) -> nn.Module:
        """A fresh `Denoiser`, with gates that start closed so that training starts calmly."""

    def build_pipeline(
        self, vae: Any, denoiser: Any, tokenizer: PreTrainedTokenizerFast
    ) -> Pipeline:
        """The stock pipeline of these very modules; nothing is copied."""

    def build_scheduler(self, size: Size) -> Any:
        """A sampling schedule whose noise levels are shifted as in training at a size."""

    def call(self, prompts: Sequence[str], size: Size, *, distilled: bool) -> dict[str, Any]:
        """Arguments of the pipeline's call for guided samples."""

    def clips(self, result: Any) -> list[np.ndarray]:
        """What a call made, clip by clip, each `[F, H, W, 3]` from 0 to 1."""
