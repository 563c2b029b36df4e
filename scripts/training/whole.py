"""`AutoencoderKLWan` over a whole clip at once, for training.

The stock model works through a clip in pieces of four frames (encoder) or one latent (decoder) and
hands on what its causal convolutions need. That saves memory, but takes five to twenty times as
many kernels. These functions run the same modules over all frames; the tests compare the results.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor


def encode(vae: Any, video: Tensor) -> DiagonalGaussianDistribution:
    """The posterior of clips `[B, 3, F, H, W]` from -1 to 1, as `vae.encode` gives it."""
    encoder = vae.encoder
    hidden = encoder.conv_in(patchify(video, vae.config.patch_size))
    for layer in encoder.down_blocks:
        hidden = _downsample(layer, hidden) if isinstance(layer, WanResample) else layer(hidden)
    hidden = encoder.nonlinearity(encoder.norm_out(encoder.mid_block(hidden)))
    return DiagonalGaussianDistribution(vae.quant_conv(encoder.conv_out(hidden)))


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Clips `[B, 3, F, H, W]` of latents, as `vae.decode` makes them, but not clamped."""
    decoder = vae.decoder
    hidden = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            hidden = resnet(hidden)
        for layer in block.upsamplers or ():
            hidden = _upsample(layer, hidden)
    hidden = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(hidden)))
    return unpatchify(hidden, vae.config.patch_size)


# Without a cache a stock resampling layer changes height and width alone. The first frame of a clip
# stands for itself in time; the others are halved or doubled.


def _downsample(layer: Any, hidden: Tensor) -> Tensor:
    hidden = layer(hidden)
    if layer.mode != "downsample3d" or hidden.shape[2] == 1:
        return hidden
    return torch.cat([hidden[:, :, :1], layer.time_conv(hidden)], dim=2)


def _upsample(layer: Any, hidden: Tensor) -> Tensor:
    if layer.mode == "upsample3d" and hidden.shape[2] > 1:
        later = layer.time_conv(hidden[:, :, 1:]).unflatten(1, (2, -1))
        later = later.movedim(1, 3).flatten(2, 3)
        hidden = torch.cat([hidden[:, :, :1], later], dim=2)
    return layer(hidden)
