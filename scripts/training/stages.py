"""What each training stage trains, on which data, and what it shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.training.autoencoder import Encoder
from scripts.training.buckets import Bucket
from scripts.training.denoiser import draw_times
from scripts.training.loop import Randomness
from scripts.training.prefetch import Batch
from scripts.training.recipe import TEXT_LENGTH
from scripts.training.source import Source
from scripts.training.tokenizer import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DROPPED = 0.1


@dataclass(frozen=True)
class Stage:
    """Defaults of a stage.

    Args:
        part: what it trains, `"vae"` or `"denoiser"`.
        kinds: sets of sprites.
        sizes: see `buckets.parse_buckets`.
        lr: peak learning rate.
        cooldown: see `clock.Clock`.
        shown: frames, height and width of the sample clips.
    """

    part: str
    kinds: tuple[str, ...]
    sizes: str
    lr: float
    cooldown: float
    shown: tuple[int, int, int]


STAGES = {
    "vae": Stage(
        part="vae",
        kinds=("clips",),
        sizes="9x64x64:48,17x64x64:24,5x128x128:24,1x128x128:64",
        lr=1e-3,
        cooldown=0.5,
        shown=(9, 128, 128),
    ),
    "images": Stage(
        part="denoiser",
        kinds=("images",),
        sizes="1x128x128:256*4,1x192x192:112,1x256x256:64",
        lr=1e-3,
        cooldown=0.0,
        shown=(1, 128, 128),
    ),
    "clips": Stage(
        part="denoiser",
        kinds=("clips",),
        sizes="9x128x128:48*3,17x128x128:24*3,25x128x128:16,1x128x128:192",
        lr=8e-4,
        cooldown=0.0,
        shown=(17, 128, 128),
    ),
    "long": Stage(
        part="denoiser",
        kinds=("clips",),
        sizes="49x128x128:12*4,25x128x128:20*3,25x192x192:8,25x256x256:5,49x256x256:2,1x256x256:64",
        lr=6e-4,
        cooldown=0.3,
        shown=(49, 128, 128),
    ),
}


@dataclass(frozen=True, eq=False)
class Reconstructing:
    """Clips through the VAE; see `autoencoder.Reconstruction`."""

    source: Source

    def batch(self, bucket: Bucket, draws: Randomness) -> Batch:
        return (draw_clips(self.source, bucket, draws.data)[0],)

    def loss(self, model: nn.Module, batch: Batch, draws: Randomness) -> Tensor:
        return model(batch[0], draws.noise)


@dataclass(frozen=True, eq=False)
class FlowMatching:
    """The flow from latents to noise (Lipman et al., arXiv 2210.02747).

    Args:
        encoder: makes latents.
        patch: latents of a token.
        dropped: share of captions that are replaced by an empty one, for guidance.
    """

    source: Source
    encoder: Encoder
    tokenizer: PreTrainedTokenizerFast
    patch: int
    dropped: float = DROPPED

    def batch(self, bucket: Bucket, draws: Randomness) -> Batch:
        video, captions = draw_clips(self.source, bucket, draws.data)
        kept = ["" if draws.chance.random() < self.dropped else text for text in captions]
        ids, mask = encode(self.tokenizer, kept, TEXT_LENGTH, video.device)
        return self.encoder(video), ids, mask

    def loss(self, model: nn.Module, batch: Batch, draws: Randomness) -> Tensor:
        latents, ids, mask = batch
        noise = torch.randn(latents.shape, generator=draws.noise, device=latents.device)
        tokens = latents[0, 0].numel() // self.patch
        times = draw_times(len(latents), tokens, draws.noise)
        noisy = torch.lerp(latents, noise, times.view(-1, 1, 1, 1, 1))
        flow = model(noisy, times, ids, mask)
        return F.mse_loss(flow.float(), noise - latents)


def draw_clips(
    source: Source, bucket: Bucket, generator: torch.Generator
) -> tuple[Tensor, list[str]]:
    """Clips of a bucket, `[B, 3, F, H, W]` from -1 to 1, with captions."""
    return source.batch(bucket.batch, bucket.frames, bucket.height, bucket.width, generator)
