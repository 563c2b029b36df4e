"""Problems that drive a block-sparse kernel through all of its variants."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_sparse.grid import Permutation
from dit_sparse.plan import BlockPlan, Blocks
from tests.problems import Boxes

BATCH, HEADS = 2, 2


@dataclass(frozen=True)
class Case:
    """One combination of everything that a kernel tells apart.

    Args:
        order: whose permutation: nobody's (`"none"`), shared by all heads, or one per head.
        lists: whether lists are shared, one per head, or one per batch entry and head.
        tile: keys of a kernel tile: as few as 32 (`"small"`), or the whole key block.
        bits: of the coordinates that boxes are made of; with 3 a block has more classes of queries
            (`dit_sparse.mask_product`) than fit, with 2 as many as do.
        tokens: about this many, `None` for just enough.
    """

    head_dim: int
    q_block: int
    k_block: int
    dtype: torch.dtype = torch.float32
    ragged: bool = True
    box: bool = True
    order: str = "none"
    lists: str = "batch"
    tile: str = "small"
    bits: tuple[int, ...] = (2, 0, 2)
    tokens: int | None = None

    @property
    def tile_keys(self) -> int:
        return min(self.k_block, 32) if self.tile == "small" else self.k_block

    def __str__(self) -> str:
        flags = [name for name in ("ragged", "box") if getattr(self, name)]
        size = [f"N{self.tokens}"] if self.tokens else []
        dtype = str(self.dtype).removeprefix("torch.")
        blocks = f"{self.q_block}x{self.k_block}/{self.tile_keys}"
        flags += [f"bits{self.bits[-1]}"] if self.box else []
        parts = [f"D{self.head_dim}", *size, blocks, dtype, *flags]
        return "-".join([*parts, f"order={self.order}", f"lists={self.lists}"])


def covering(factors: Mapping[str, Sequence[Any]], strength: int) -> list[dict[str, Any]]:
    """Few combinations that hold every choice of values for any `strength` factors.

    Greedy and deterministic: each combination starts from values not seen together yet, and is
    the best of some random completions.
    """
    source = random.Random(0)
    names = list(factors)
    missing = {
        tuple(zip(group, values, strict=True)): None
        for group in itertools.combinations(names, strength)
        for values in itertools.product(*(factors[name] for name in group))
    }
    chosen = []
    while missing:
        fixed = dict(next(iter(missing)))
        best, best_hit = {}, []
        for _ in range(40):
            candidate = {name: fixed.get(name, source.choice(factors[name])) for name in names}
            seen = itertools.combinations(candidate.items(), strength)
            hit = [group for group in seen if group in missing]
            if len(hit) > len(best_hit):
                best, best_hit = candidate, hit
        for group in best_hit:
            del missing[group]
        chosen.append(best)
    return chosen


def plan_of(case: Case) -> BlockPlan:
    """Random lists with an empty row, a row that reads only the last block, and short blocks."""
    generator = torch.Generator().manual_seed(hash_of(case))
    q_runs, k_runs = _runs(case)
    q_blocks, k_blocks = Blocks.of_runs(q_runs, case.q_block), Blocks.of_runs(k_runs, case.k_block)
    lead = {"shared": (1, 1), "head": (1, HEADS), "batch": (BATCH, HEADS)}[case.lists]
    shape = (*lead, q_blocks.n, k_blocks.n)
    visited = torch.rand(shape, generator=generator) < 0.5
    visited[0, 0, 0] = False
    visited[0, -1, -1] = torch.arange(k_blocks.n) == k_blocks.n - 1
    full = boxes = order = None
    total = q_blocks.total
    if case.box:
        full = torch.rand(shape, generator=generator) < 0.5
        box_heads = HEADS if case.lists != "shared" else 1
        boxes = Boxes.random(case.bits, box_heads, total, total, hash_of(case))
    if case.order != "none":
        rows = [torch.randperm(total, generator=generator) for _ in range(HEADS)]
        order = Permutation(rows[0] if case.order == "shared" else torch.stack(rows))
    return BlockPlan.from_mask(
        visited, q_blocks, k_blocks, full=full, box=boxes and boxes.packed(), order=order
    )


def _runs(case: Case) -> tuple[list[int], list[int]]:
    """Runs of queries and of keys; of equal sums, since orders permute both."""
    least, most = sorted((case.q_block, case.k_block))
    if not case.ragged:
        whole = max((case.tokens or 0) // most, 2) * most
        return [whole], [whole]
    q_runs = [most + 3, 1, least + 7, least - 1]
    q_runs.append(max(0, (case.tokens or 0) - sum(q_runs)))
    return q_runs, q_runs[::-1]


def hash_of(case: Case) -> int:
    """The same number in every process, unlike `hash`."""
    return sum(ord(c) * 31**i for i, c in enumerate(str(case))) % 2**31


def tensors_of(
    case: Case, plan: BlockPlan, device: str = "cpu", value_dim: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v `[B, H, N, D]` in memory of `[B, N, H, D]`, as diffusers models make them."""
    generator = torch.Generator().manual_seed(hash_of(case) + 1)
    sizes = (
        (plan.q_blocks.total, case.head_dim),
        (plan.k_blocks.total, case.head_dim),
        (plan.k_blocks.total, value_dim or case.head_dim),
    )
    q, k, v = (
        torch.randn(BATCH, n, HEADS, d, generator=generator).to(device, case.dtype).transpose(1, 2)
        for n, d in sizes
    )
    return q, k, v


def slices(x: Tensor) -> Tensor:
    """The same values inside a larger buffer of NaN, at an offset in every dimension."""
    batch, heads, tokens, dim = x.shape
    room = torch.full(
        (batch + 1, tokens + 37, heads + 2, dim + 8), float("nan"), dtype=x.dtype, device=x.device
    )
    inner = room[1:, 21 : 21 + tokens, 1:-1, :dim].transpose(1, 2)
    inner.copy_(x)
    return inner


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads first": lambda x: x.contiguous(),
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slices among NaN": slices,
    "one entry for the batch": lambda x: x[:1].expand(x.shape),
    "one head for all": lambda x: x[:, :1].expand(x.shape),
    "dim outermost": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "tokens flipped twice": lambda x: x.flip(2).contiguous().flip(2),
}
