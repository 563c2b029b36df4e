"""Losses, latents and measurements of the video VAE."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.training import whole

EDGE_WEIGHT = 0.5
KL_WEIGHT = 1e-4


class Reconstruction(nn.Module):
    """An `AutoencoderKLWan` and the loss that trains it."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """The loss, a scalar: L1 of pixels and of their differences, and the latents' KL.

        Args:
            video: `[B, 3, F, H, W]` from -1 to 1, 4n + 1 frames.
            generator: of the noise in the latents.
        """
        posterior = whole.encode(self.vae, video)
        noise = torch.randn(posterior.mean.shape, generator=generator, device=video.device)
        made = whole.decode(self.vae, posterior.mean + posterior.std * noise).float()
        divergence = posterior.mean.square() + posterior.var - 1 - posterior.logvar
        kl = 0.5 * divergence.float().mean()
        edges = sum(_edge_error(made, video, dim) for dim in (2, 3, 4) if video.shape[dim] > 1)
        return F.l1_loss(made, video) + EDGE_WEIGHT * edges + KL_WEIGHT * kl


def _edge_error(made: Tensor, video: Tensor, dim: int) -> Tensor:
    return F.l1_loss(made.diff(dim=dim), video.diff(dim=dim))


@torch.no_grad()
def raw_latents(vae: Any, video: Tensor) -> Tensor:
    """Means of the latents of clips, `[B, C, F', H', W']` float32, not normalised."""
    return whole.encode(vae, video).mean.float()


class Encoder:
    """Latents as the transformer sees them: of mean 0 and deviation 1 in every channel.

    Args:
        vae: on its device, with measured latent statistics in its settings.
    """

    def __init__(self, vae: Any) -> None:
        # The stock VAE keeps caches on itself: one in use by two threads would mix clips.
        self.vae = copy.deepcopy(vae)
        self.mean, self.std = (
            torch.tensor(values, device=vae.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )

    def __call__(self, video: Tensor) -> Tensor:
        """Latents `[B, C, F', H', W']` float32 of clips `[B, 3, F, H, W]` from -1 to 1."""
        with torch.autocast(video.device.type, torch.bfloat16, enabled=video.is_cuda):
            return (raw_latents(self.vae, video) - self.mean) / self.std


def latent_statistics(latents: list[Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every channel over all latents `[B, C, ...]`."""
    flat = torch.cat([z.transpose(0, 1).flatten(1) for z in latents], dim=1).double()
    return flat.mean(1).tolist(), flat.std(1).tolist()


@torch.no_grad()
def reconstruction_psnr(vae: Any, video: Tensor) -> float:
    """PSNR in dB of clips `[B, 3, F, H, W]` after encoding and decoding, peak to peak 2."""
    made = vae.decode(vae.encode(video).latent_dist.mean).sample.float()
    error = (made - video).square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / error.clamp_min(1e-10))).mean())
