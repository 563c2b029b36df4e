"""What stands for key blocks that are not read exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dit_sparse.predicate import make_contiguous


@dataclass(frozen=True, eq=False)
class Pools:
    """Entries that stand for a key block by means of its keys and values.

    An entry of factor g stands for its block by one row per group of g consecutive keys (the last
    group may be smaller): their mean key and mean value, with bias ln(count) on the score.

    Args:
        factors: powers of two from 2 to 128, ascending.
        counts: int32 `[1 or B, 1 or H, n_q, len(factors)]`, entries of each factor in a row.
    """

    factors: tuple[int, ...]
    counts: Tensor

    def __post_init__(self) -> None:
        make_contiguous(self, ("counts",))

    def to(self, device: torch.device | str) -> Pools:
        return Pools(self.factors, self.counts.to(device))

    def __str__(self) -> str:
        return f"pools of {', '.join(map(str, self.factors))}"


Tail = Literal["none", "zeroth", "first", "block"]
