"""Calibrations made up for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dit_sparse import orders
from dit_sparse.calibration import Calibration, pack
from dit_sparse.frame import frame_of
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.method import CallContext
from dit_sparse.methods.paro import ParoMethod
from dit_sparse.model_identity import ModelIdentity

GRID = TokenGrid(3, 5, 7)  # 105 tokens, 7 blocks of 16, the last one short
BLOCK = 16
MODEL = ModelIdentity("WanTransformer3DModel", "0" * 64, "owner/name")


def blocks_of(grid: TokenGrid = GRID, block: int = BLOCK) -> int:
    return frame_of(TokenLayout.of(grid), block).blocks.n


def calibration(
    masks: Mapping[int, Tensor],
    names: Sequence[Sequence[str]],
    segments: Sequence[int] = (0,),
    grid: TokenGrid = GRID,
    block: int = BLOCK,
) -> Calibration:
    """A calibration with bool masks `[layers, H, n, n]` and orders by name."""
    numbers = torch.tensor([[orders.AXES.index(n) for n in row] for row in names])
    shape = (max(segments) + 1, *numbers.shape)
    density = torch.zeros(shape)
    for segment, mask in masks.items():
        density[segment] = mask.float().mean((2, 3))
    return Calibration(
        model=MODEL,
        grid=grid,
        block=block,
        orders=numbers.to(torch.uint8),
        segments=tuple(segments),
        masks={segment: pack(mask) for segment, mask in masks.items()},
        density=density,
        kept_mass=torch.full(shape, 0.75),
        dense_heads=((0, 0, 1),),
        provenance={"prompts": "abc"},
    )


def method(found: Calibration, folder: Path, tail: str = "none") -> ParoMethod:
    """The method that reads a calibration from a file."""
    return ParoMethod(str(found.save_pretrained(folder)), tail)


def context(
    found: Calibration, layout: TokenLayout | None = None, layer: int = 0, step: int = 0
) -> CallContext:
    layout = layout or TokenLayout.of(found.grid)
    return CallContext(layout, layer, found.layers, step, found.steps)


def random_masks(layers: int, heads: Sequence[float], n: int, seed: int = 0) -> Tensor:
    """bool `[layers, H, n, n]` of these densities; every row reads a block, maybe only its last."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(layers, len(heads), n, n, generator=generator)
    masks = draw < torch.tensor(heads)[:, None, None]
    masks[..., -1] |= ~masks.any(-1)
    return masks
