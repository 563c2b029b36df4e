"""What is learnt: reconstruction, the flow from latents to noise, and guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.training.autoencoder import Encoder
from scripts.training.buckets import Bucket
from scripts.training.loop import Randomness
from scripts.training.prefetch import Batch
from scripts.training.recipe import TEXT_LENGTH, Recipe
from scripts.training.source import Source
from scripts.training.times import draw_times
from scripts.training.tokenizer import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DROPPED = 0.1

#: Guidance scales that are distilled.
SCALES = (1.0, 6.0)


@dataclass(frozen=True, eq=False)
class Reconstructing:
    """Pictures through the VAE; see `autoencoder.Reconstruction`."""

    source: Source
    recipe: Recipe

    def batch(self, bucket: Bucket, draws: Randomness) -> Batch:
        return (self.recipe.for_vae(draw_clips(self.source, bucket, draws.data)[0]),)

    def loss(self, model: nn.Module, batch: Batch, draws: Randomness) -> Tensor:
        return model(batch[0], draws.noise)


@dataclass(frozen=True, eq=False)
class Captioned:
    """Makes latents with token ids and their mask.

    Args:
        source: of clips.
        encoder: makes latents.
        tokenizer: of the captions.
        dropped: share of captions that are replaced by an empty one, for guidance.
    """

    source: Source
    encoder: Encoder
    tokenizer: PreTrainedTokenizerFast
    dropped: float = DROPPED

    def __call__(self, bucket: Bucket, draws: Randomness) -> Batch:
        video, captions = draw_clips(self.source, bucket, draws.data)
        kept = ["" if draws.chance.random() < self.dropped else text for text in captions]
        ids, mask = encode(self.tokenizer, kept, TEXT_LENGTH, video.device)
        return self.encoder(video), ids, mask


@dataclass(frozen=True, eq=False)
class FlowMatching:
    """The flow from latents to noise (Lipman et al., arXiv 2210.02747).

    Args:
        examples: makes batches of latents, token ids and their mask.
        patch: latents of a token.
    """

    examples: Callable[[Bucket, Randomness], Batch]
    patch: int

    def batch(self, bucket: Bucket, draws: Randomness) -> Batch:
        return self.examples(bucket, draws)

    def loss(self, model: nn.Module, batch: Batch, draws: Randomness) -> Tensor:
        latents, ids, mask = batch
        noisy, times, noise = _disturb(latents, self.patch, draws)
        flow = model(noisy, times, ids, mask)
        return F.mse_loss(flow.float(), noise - latents)


@dataclass(frozen=True, eq=False)
class Distilling:
    """Classifier-free guidance in one pass (Meng et al., arXiv 2210.03142, stage one).

    Args:
        examples: makes batches of latents, token ids and their mask.
        tokenizer: of the captions.
        patch: latents of a token.
        teacher: the frozen denoiser before this stage, with a guidance input that it knows as 1.
    """

    examples: Callable[[Bucket, Randomness], Batch]
    tokenizer: PreTrainedTokenizerFast
    patch: int
    teacher: nn.Module

    def batch(self, bucket: Bucket, draws: Randomness) -> Batch:
        latents, ids, mask = self.examples(bucket, draws)
        empty = encode(self.tokenizer, [""], TEXT_LENGTH, latents.device)
        return (latents, ids, mask, *(row.expand_as(ids) for row in empty))

    def loss(self, model: nn.Module, batch: Batch, draws: Randomness) -> Tensor:
        latents, ids, mask, *empty = batch
        noisy, times, _ = _disturb(latents, self.patch, draws)
        least, most = SCALES
        scales = least + (most - least) * torch.rand(
            len(latents), generator=draws.noise, device=latents.device
        )
        with (
            torch.no_grad(),
            torch.autocast(latents.device.type, torch.bfloat16, enabled=latents.is_cuda),
        ):
            flow = self.teacher(noisy, times, ids, mask).float()
            free = self.teacher(noisy, times, *empty).float()
        guided = free + _along(scales, latents) * (flow - free)
        return F.mse_loss(model(noisy, times, ids, mask, scales).float(), guided)


def _disturb(latents: Tensor, patch: int, draws: Randomness) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, the noise levels `[B]` and the noise."""
    noise = torch.randn(latents.shape, generator=draws.noise, device=latents.device)
    times = draw_times(len(latents), latents[0, 0].numel() // patch, draws.noise)
    return torch.lerp(latents, noise, _along(times, latents)), times, noise


def _along(values: Tensor, latents: Tensor) -> Tensor:
    """Values `[B]`, one for each of the latents `[B, ...]`."""
    return values.view(-1, *[1] * (latents.ndim - 1))


def draw_clips(
    source: Source, bucket: Bucket, generator: torch.Generator
) -> tuple[Tensor, list[str]]:
    """Clips of a bucket, `[B, 3, F, H, W]` from -1 to 1, with captions."""
    return source.batch(bucket.batch, bucket.frames, bucket.height, bucket.width, generator)
