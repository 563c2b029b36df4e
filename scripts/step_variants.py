"""Methods at fixed densities, for timing models whose weights are random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from dit_sparse.calibration import Calibration, pack
from dit_sparse.frame import frame_of
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.method import SparseMethod
from dit_sparse.methods.paro import ParoMethod
from dit_sparse.methods.pisa import PisaMethod
from dit_sparse.methods.psa import PsaMethod
from dit_sparse.methods.window import WindowMethod
from dit_sparse.orders import AXES
from dit_sparse.pipelines.identity import identity_of

_BLOCK = 128


#: `pisa` has the method's own first-order tail, which a slower kernel runs. `psa` samples tokens as
#: its paper does, which is 1/32 of dense attention's products in every call, and beyond 65,536
#: tokens 1/128; `psa-means` looks at means in their place.
NAMES = ("window", "pisa-zeroth", "pisa", "psa", "psa-means", "paro")


def names(densities: Sequence[float]) -> list[str]:
    """Of all variants at these densities."""
    return [f"{name} {d}" for name in NAMES for d in densities]


def variants(densities: Sequence[float]) -> Iterator[tuple[str, SparseMethod]]:
    """Windows, PISA and PSA at these densities, by name.

    PSA computes half of its density exactly, and of the rest half at level 2 and a quarter each at
    the levels 4 and 8; what PISA's tail reads comes on top of its density.
    """
    for density in densities:
        yield f"window {density}", WindowMethod(density=density)
    for density in densities:
        yield f"pisa-zeroth {density}", PisaMethod(density=density, tail="zeroth")
        yield f"pisa {density}", PisaMethod(density=density)
    for density in densities:
        ends = [min(1.0, density * share) for share in (0.5, 1.0, 1.5, 2.5)]
        yield f"psa {density}", PsaMethod(ends=tuple(ends))
        yield f"psa-means {density}", PsaMethod(ends=tuple(ends), importance="means")


def paro_method(
    transformer: nn.Module,
    grid: TokenGrid,
    layers: int,
    heads: int,
    density: float,
    folder: Path,
    device: torch.device | str = "cpu",
) -> SparseMethod:
    """PARO with a random axis order for each head, and random blocks of this density.

    Every row of blocks reads its own block and so many others, the same number in every row.
    """
    n = frame_of(TokenLayout((grid,)), _BLOCK).candidates
    count = max(1, round(density * n))
    generator = torch.Generator(device).manual_seed(0)
    masks = []
    for _ in range(layers):
        score = torch.rand(heads, n, n, generator=generator, device=device)
        score.diagonal(dim1=1, dim2=2).fill_(2.0)
        chosen = torch.zeros_like(score, dtype=torch.bool)
        chosen.scatter_(2, score.topk(count, dim=2).indices, True)
        masks.append(pack(chosen.cpu()))
    seed = torch.Generator().manual_seed(0)
    orders = torch.randint(len(AXES), (layers, heads), generator=seed).to(torch.uint8)
    shares = torch.full((1, layers, heads), count / n)
    calibration = Calibration(
        model=identity_of(transformer),
        grid=grid,
        block=_BLOCK,
        orders=orders,
        segments=(0,),
        masks={0: torch.stack(masks)},
        density=shares,
        kept_mass=torch.ones(1, layers, heads),
    )
    path = folder / f"paro-{density}"
    calibration.save_pretrained(path)
    return ParoMethod(str(path))
