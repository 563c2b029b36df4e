"""Losses, latents and measurements of VAEs."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.training.recipe import Recipe

EDGE_WEIGHT = 0.5
KL_WEIGHT = 1e-4


class Reconstruction(nn.Module):
    """A VAE of a recipe and the loss that trains it."""

    def __init__(self, vae: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.vae = vae
        self.recipe = recipe

    def forward(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
        """The loss, a scalar: L1 of pixels and of their differences, and the latents' KL.

        Args:
            pictures: `[B, 3, F, H, W]` or `[B, 3, H, W]`, as the VAE takes it, from -1 to 1.
            generator: of the noise in the latents.
        """
        posterior = self.recipe.encode(self.vae, pictures)
        noise = torch.randn(posterior.mean.shape, generator=generator, device=pictures.device)
        made = self.recipe.decode(self.vae, posterior.mean + posterior.std * noise).float()
        divergence = posterior.mean.square() + posterior.var - 1 - posterior.logvar
        kl = 0.5 * divergence.float().mean()
        wide = [dim for dim in range(2, pictures.ndim) if pictures.shape[dim] > 1]
        edges = sum(_edge_error(made, pictures, dim) for dim in wide)
        return F.l1_loss(made, pictures) + EDGE_WEIGHT * edges + KL_WEIGHT * kl


def _edge_error(made: Tensor, pictures: Tensor, dim: int) -> Tensor:
    return F.l1_loss(made.diff(dim=dim), pictures.diff(dim=dim))


@torch.no_grad()
def raw_latents(vae: Any, recipe: Recipe, video: Tensor) -> Tensor:
    """Means of the latents of clips `[B, 3, F, H, W]`, `[B, C, ...]` float32, not normalised."""
    return recipe.encode(vae, recipe.for_vae(video)).mean.float()


class Encoder:
    """Latents as the transformer sees them: of mean 0 and deviation 1.

    Args:
        vae: on its device.
        recipe: with measured latent statistics.
    """

    def __init__(self, vae: Any, recipe: Recipe) -> None:
        # A stock video VAE keeps caches on itself: one in use by two threads would mix clips.
        self.vae = copy.deepcopy(vae)
        self.recipe = recipe
        self.mean, self.std = (torch.tensor(v, device=vae.device) for v in recipe.statistics())

    def __call__(self, video: Tensor) -> Tensor:
        """Latents `[B, C, ...]` float32 of clips `[B, 3, F, H, W]` from -1 to 1."""
        with torch.autocast(video.device.type, torch.bfloat16, enabled=video.is_cuda):
            latents = raw_latents(self.vae, self.recipe, video)
        mean, std = (v.view(-1, *[1] * (latents.ndim - 2)) for v in (self.mean, self.std))
        return (latents - mean) / std


def latent_statistics(latents: list[Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every channel over all latents `[B, C, ...]`."""
    flat = torch.cat([z.transpose(0, 1).flatten(1) for z in latents], dim=1).double()
    return flat.mean(1).tolist(), flat.std(1).tolist()


@torch.no_grad()
def reconstruction_psnr(vae: Any, pictures: Tensor) -> float:
    """PSNR in dB of pictures `[B, 3, ...]` after encoding and decoding, peak to peak 2."""
    made = vae.decode(vae.encode(pictures).latent_dist.mean).sample.float()
    error = (made - pictures).square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / error.clamp_min(1e-10))).mean())
