"""Published transformer configurations with inputs of one size, for timing denoising steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    WanTransformer3DModel,
)
from torch import nn

from dit_sparse.grid import TokenGrid


@dataclass(frozen=True)
class Model:
    """A published transformer and the inputs of one size.

    All its layers but those of its ends come in equal units: one block, or one block with two
    streams and two with one.

    Args:
        build: makes the transformer with so many units on the default device and dtype.
        inputs: makes the arguments of its forward.
        stacks: attribute names of its lists of blocks, with the blocks of a unit in each.
        units: of the published model.
        heads, head_dim: of its self-attention.
        grid: the picture's tokens.
        text: tokens of the text in its sequence.
        whole: so small that all units are timed by default.
    """

    build: Callable[[int], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    stacks: Mapping[str, int]
    units: int
    heads: int
    head_dim: int
    grid: TokenGrid
    text: int = 0
    whole: bool = False

    @property
    def tokens(self) -> int:
        return self.grid.length + self.text

    def layers(self, units: int) -> int:
        """Blocks with self-attention in so many units."""
        return units * sum(self.stacks.values())

    def cut(self, transformer: nn.Module, lists: Mapping[str, nn.ModuleList], units: int) -> None:
        """Leaves the transformer so many units of the lists of blocks that it was built with."""
        for name, of_unit in self.stacks.items():
            blocks = list(lists[name])[: units * of_unit]
            setattr(transformer, name, nn.ModuleList(blocks))


def wan(
    heads: int, ffn: int, layers: int, frames: int, height: int, width: int, whole: bool = False
) -> Model:
    def build(units: int) -> nn.Module:
        return WanTransformer3DModel(
            num_attention_heads=heads, ffn_dim=ffn, num_layers=units, text_dim=4096
        )

    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 16, frames, height, width),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, 512, 4096),
        }

    grid = TokenGrid(frames, height // 2, width // 2)
    return Model(build, inputs, {"blocks": 1}, layers, heads, 128, grid, whole=whole)


_TWO_STREAMS = {"transformer_blocks": 1, "single_transformer_blocks": 2}


def flux(pixels: int, whole: bool = False) -> Model:
    side = pixels // 16

    def build(units: int) -> nn.Module:
        return FluxTransformer2DModel(
            num_layers=units, num_single_layers=2 * units, guidance_embeds=True
        )

    def inputs() -> dict[str, Any]:
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3)
        return {
            "hidden_states": torch.randn(1, side * side, 64),
            "encoder_hidden_states": torch.randn(1, 512, 4096),
            "pooled_projections": torch.randn(1, 768),
            "timestep": torch.tensor([0.5]),
            "guidance": torch.tensor([3.5]),
            "img_ids": ids,
            "txt_ids": torch.zeros(512, 3),
        }

    grid = TokenGrid(1, side, side)
    return Model(build, inputs, _TWO_STREAMS, 19, 24, 128, grid, 512, whole)


def hunyuan(frames: int, height: int, width: int) -> Model:
    def build(units: int) -> nn.Module:
        return HunyuanVideoTransformer3DModel(num_layers=units, num_single_layers=2 * units)

    def inputs() -> dict[str, Any]:
        mask = torch.zeros(1, 256, dtype=torch.int64)
        mask[:, :40] = 1
        return {
            "hidden_states": torch.randn(1, 16, frames, height, width),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, 256, 4096),
            "encoder_attention_mask": mask,
            "pooled_projections": torch.randn(1, 768),
            "guidance": torch.tensor([6000.0]),
        }

    grid = TokenGrid(frames, height // 2, width // 2)
    return Model(build, inputs, _TWO_STREAMS, 20, 24, 128, grid, 256)


def cogvideox(frames: int, height: int, width: int) -> Model:
    """The 5B model, which has rotary embeddings, unlike the 2B one."""
    heads = 48

    def build(units: int) -> nn.Module:
        return CogVideoXTransformer3DModel(
            num_attention_heads=heads, num_layers=units, use_rotary_positional_embeddings=True
        )

    def inputs() -> dict[str, Any]:
        angles = torch.randn(frames * height * width // 4, 64)
        return {
            "hidden_states": torch.randn(1, frames, 16, height, width),
            "encoder_hidden_states": torch.randn(1, 226, 4096),
            "timestep": torch.tensor([500.0]),
            "image_rotary_emb": (angles.cos(), angles.sin()),
        }

    grid = TokenGrid(frames, height // 2, width // 2)
    return Model(build, inputs, {"transformer_blocks": 1}, 42, heads, 64, grid, 226, whole=True)


#: What matters most comes first.
MODELS = {
    "wan-1.3b-480p": wan(12, 8960, 30, 21, 60, 104, whole=True),
    "wan-14b-720p": wan(40, 13824, 40, 21, 90, 160),
    "hunyuan-720p": hunyuan(33, 90, 160),
    "flux-4096": flux(4096),
    "cogvideox-5b": cogvideox(13, 60, 90),
    "flux-1024": flux(1024, whole=True),
    "wan-14b-480p": wan(40, 13824, 40, 21, 60, 104),
    "flux-2048": flux(2048, whole=True),
    "wan-1.3b-720p": wan(12, 8960, 30, 21, 90, 160),
}
