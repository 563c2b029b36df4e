"""From what a calibration added up to orders and masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dit_sparse import options
from dit_sparse.block_budget import Criterion, by_density, by_mass, kept_mass, row_shares
from dit_sparse.calibration import Calibration, pack
from dit_sparse.frame import frame_of
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.model_identity import ModelIdentity
from dit_sparse.orders import AXES
from dit_sparse.step_segments import Split, segment_table
from dit_sparse.tally import Tally


@dataclass(frozen=True)
class Target:
    """What masks are to reach: one of the two.

    Args:
        density: share of the picture's block pairs that is read.
        mass: share of each row's softmax mass that is read.

    Raises:
        ValueError: both, neither, or a number out of range.
    """

    density: float | None = None
    mass: float | None = None

    def __post_init__(self) -> None:
        options.check_one_share("to calibrate for", "density", "mass", vars(self))


@dataclass(frozen=True)
class Settings:
    """How a calibration measures and what it shares.

    Args:
        segments: parts of the generation with masks of their own.
        split: `"uniform"`, or `"halves"` with one segment for the second half of the steps.
        block: tokens of a block: 64 as in the paper, or 128, which is faster on Hopper.
        criterion: what orders are chosen by: the paper's cost, or the concentration of the mass in
            few blocks; `"raster"` leaves all heads in the model's order, to measure against.
        order_steps: steps of the first generation that orders are compared at, spread evenly.
        every: maps are added up at every so many steps, and at the first of each segment.
        budget: what shares a density: the heads of a `"layer"`, or each `"head"` for itself.
        least_mass: heads whose mask keeps less of the mass among picture blocks read everything.
        seed: of the initial noise of the first prompt; the next one has the next number.

    Raises:
        ValueError: numbers or names out of range.
    """

    segments: int = 4
    split: Split = "uniform"
    block: int = 128
    criterion: Criterion = "concentration"
    order_steps: int = 4
    every: int = 1
    budget: Literal["layer", "head"] = "layer"
    least_mass: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("segments", "order_steps", "every"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"Expected {name} to be an integer of at least 1, got {value!r}.")
        options.check_block(self.block)
        options.check_choice("split", self.split, get_args(Split))
        options.check_choice("criterion", self.criterion, get_args(Criterion))
        options.check_choice("budget", self.budget, ("layer", "head"))
        if not options.is_number(self.least_mass) or not 0.0 <= self.least_mass <= 1.0:
            raise ValueError(f"Expected a least_mass from 0 to 1, got {self.least_mass!r}.")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise ValueError(f"Expected a seed from 0 to 2**63 - 1, got {self.seed!r}.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def forced_of(grid: TokenGrid, block: int) -> Tensor:
    """bool `[n, n]`: pairs of picture blocks that are read in any case, those with a short block.

    PARO's code reads its last row and column always, since text makes them short. Where all blocks
    are whole there is nothing to make up for.
    """
    frame = frame_of(TokenLayout((grid,)), block)
    short = frame.blocks.lengths < block
    return short[:, None] | short


def check_target(target: Target, grid: TokenGrid, block: int) -> None:
    """Refuses a density that no mask of this grid has, before anything is measured.

    Raises:
        ValueError: forced blocks alone are more.
    """
    forced = forced_of(grid, block)
    if target.density is not None:
        by_density(row_shares(forced.float())[None], target.density, forced, shared=True)


def solve(
    tally: Tally,
    settings: Settings,
    target: Target,
    model: ModelIdentity,
    provenance: Mapping[str, Any],
) -> Calibration:
    """Orders and masks.

    Args:
        tally: of whole generations.
        settings: those that it was made with.
        target: what masks are to reach.
        model: the transformer.
        provenance: kept in the result, with the settings, target and facts.

    Raises:
        ValueError: the density has not room for what must be read.
    """
    facts = tally.facts
    assert facts is not None  # a generation was run
    segments = segment_table(facts.steps, settings.segments, settings.split)
    shape = (settings.segments, facts.layers, facts.heads)
    density, kept = torch.zeros(shape), torch.zeros(shape)
    masks: dict[int, Tensor] = {}
    dense: list[tuple[int, int, int]] = []
    for segment, layer in sorted(tally.sums):
        shares = row_shares(tally.sums[segment, layer])
        mask = _mask(shares, settings, target, forced_of(facts.grid, settings.block))
        kept[segment, layer] = kept_mass(shares, mask)
        weak = kept[segment, layer] < settings.least_mass
        dense += [(segment, layer, head) for head in weak.nonzero().flatten().tolist()]
        mask |= weak[:, None, None]
        density[segment, layer] = mask.float().mean((1, 2))
        packed = pack(mask)
        masks.setdefault(segment, packed.new_zeros(facts.layers, *packed.shape))[layer] = packed
    names = [tally.orders(layer, settings.criterion) for layer in range(facts.layers)]
    return Calibration(
        model=model,
        grid=facts.grid,
        block=settings.block,
        orders=torch.tensor([[AXES.index(n) for n in row] for row in names], dtype=torch.uint8),
        segments=segments,
        masks=masks,
        density=density,
        kept_mass=kept,
        dense_heads=tuple(dense),
        provenance=dict(provenance)
        | {"target": asdict(target), "achieved_density": float(density[sorted(masks)].mean())}
        | {"settings": settings.to_dict(), "text": facts.text, "steps": facts.steps},
    )


def _mask(shares: Tensor, settings: Settings, target: Target, forced: Tensor) -> Tensor:
    if target.mass is not None:
        return by_mass(shares, target.mass, forced)
    assert target.density is not None
    return by_density(shares, target.density, forced, shared=settings.budget == "layer")
