"""Random plans with the element masks that they mean, built element by element."""

import itertools
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from dit_sparse.grid import Permutation
from dit_sparse.plan import BlockPlan, Blocks, BoxPredicate, Pools
from dit_sparse.plan_check import check

runs = st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any)
sizes = st.sampled_from([1, 2, 3, 4, 8])


@dataclass(frozen=True)
class Boxes:
    """Boxes and coordinates as they are meant, before packing: `[..., axes]`."""

    bits: tuple[int, ...]
    low: Tensor  # [heads, n_q, axes]
    high: Tensor
    key: Tensor  # [n_k, axes]
    text: Tensor  # bool [n_k]

    @staticmethod
    def random(bits: tuple[int, ...], heads: int, n_q: int, n_k: int, seed: int) -> "Boxes":
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            columns = [torch.randint(2**b, shape, generator=generator) for b in bits]
            return torch.stack(columns, dim=-1)

        ends = torch.stack([draw(heads, n_q), draw(heads, n_q)]).sort(0).values
        text = torch.rand(n_k, generator=generator) < 0.2
        return Boxes(bits, ends[0], ends[1], draw(n_k), text)

    def mask(self) -> Tensor:
        """bool `[heads, n_q, n_k]`, one comparison per axis."""
        key = self.key[None, None]
        inside = (self.low[:, :, None] <= key) & (key <= self.high[:, :, None])
        return inside.all(-1) | self.text

    def packed(self) -> BoxPredicate:
        shifts = [0, *itertools.accumulate(b + 1 for b in self.bits)][:-1]
        ones = sum((2**b - 1) << s for b, s in zip(self.bits, shifts, strict=True))
        guard = sum(1 << (s + b) for b, s in zip(self.bits, shifts, strict=True))

        def pack(values: Tensor) -> Tensor:
            return sum(values[..., a] << s for a, s in enumerate(shifts)).int()

        key = pack(self.key)
        return BoxPredicate(
            lower=pack(self.low),
            upper=pack(self.high),
            above=torch.where(self.text, ones, key).int(),
            below=torch.where(self.text, 0, key).int(),
            guard=guard,
        )


@dataclass(frozen=True)
class Problem:
    plan: BlockPlan
    expected: Tensor  # bool [B, H, N_q, N_k] in the caller's order
    listed: Tensor  # bool [B, H, n_q, n_k]


def blocks_one_by_one(blocks: Blocks) -> list[range]:
    return [range(a, b) for a, b in itertools.pairwise(blocks.starts.tolist())]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Random lists, boxes and orders, each shared or per batch entry and head."""
    seed = draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    q_runs = draw(runs)
    total = sum(q_runs)
    q_blocks = Blocks.of_runs(q_runs, draw(sizes))
    k_blocks = Blocks.of_runs(draw(st.permutations(q_runs)), draw(sizes))
    heads, batch = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2]))
    box_heads = draw(st.sampled_from([None, 1, 3]))
    order_heads = draw(st.sampled_from([None, 1, 3]))
    shape = (batch, heads, q_blocks.n, k_blocks.n)
    visited = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    full = torch.rand(shape, generator=generator) < 0.5 if box_heads else None
    boxes = None
    if box_heads:
        boxes = Boxes.random((2, 0, 3), box_heads, total, total, seed)
    order = None
    if order_heads:
        rows = [torch.randperm(total, generator=generator) for _ in range(order_heads)]
        order = Permutation(torch.stack(rows) if draw(st.booleans()) else rows[0])
    plan = BlockPlan.from_mask(
        visited, q_blocks, k_blocks, full=full, box=boxes and boxes.packed(), order=order
    )
    return Problem(plan, _expected(plan, visited, full, boxes), visited)


def _expected(plan: BlockPlan, visited: Tensor, full: Tensor | None, boxes: Boxes | None) -> Tensor:
    per_head = plan.order is not None and plan.order.index.ndim == 2
    order_heads = plan.order.index.shape[0] if plan.order is not None and per_head else 1
    heads = max(visited.shape[1], boxes.low.shape[0] if boxes else 1, order_heads)
    total = plan.q_blocks.total
    mask = torch.zeros(visited.shape[0], heads, total, total, dtype=torch.bool)
    for b, h in itertools.product(range(visited.shape[0]), range(heads)):
        list_head = h % visited.shape[1]
        inside = torch.ones(total, total, dtype=torch.bool)
        if boxes is not None:
            inside = boxes.mask()[h % boxes.low.shape[0]]
        caller = torch.arange(total)
        if plan.order is not None:
            caller = plan.order.index.view(-1, total)[h % order_heads]
        for (i, qs), (j, ks) in itertools.product(
            enumerate(blocks_one_by_one(plan.q_blocks)),
            enumerate(blocks_one_by_one(plan.k_blocks)),
        ):
            if not visited[b, list_head, i, j]:
                continue
            unmasked = full is None or full[b, list_head, i, j]
            for q, k in itertools.product(qs, ks):
                mask[b, h, caller[q], caller[k]] = bool(unmasked or inside[q, k])
    return mask


FACTORS = (2, 4, 8, 16, 32, 64, 128)


@st.composite
def pooled_plans(draw: st.DrawFn) -> BlockPlan:
    """Random plans with pooled entries of some factors, hidden blocks and any tail."""
    plan = draw(problems()).plan
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    factors = tuple(sorted(draw(st.sets(st.sampled_from(FACTORS), max_size=4))))
    hidden = None
    if draw(st.booleans()):
        hidden = torch.rand(plan.offsets.shape[0], plan.k_blocks.n, generator=generator) < 0.2
    tail = draw(st.sampled_from(["none", "zeroth", "first", "block"]))
    return check(replace(pooled(plan, factors, hidden, generator), tail=tail))


def pooled(
    plan: BlockPlan, factors: tuple[int, ...], hidden: Tensor | None, generator: torch.Generator
) -> BlockPlan:
    """Turns some entries of every row into pooled ones and drops hidden blocks, row by row."""
    indices, ends, counts = [], [0], []
    for row in range(plan.offsets.numel()):
        first, full, partial = (
            int(x.flatten()[row]) for x in (plan.offsets, plan.full, plan.partial)
        )
        entry = row // plan.offsets[0].numel()
        parts: list[list[int]] = [[] for _ in range(2 + len(factors))]
        for nth in range(full + partial):
            block = int(plan.indices[first + nth])
            if hidden is not None and bool(hidden[entry, block]):
                continue
            part = int(torch.randint(-1, len(factors), (), generator=generator))
            parts[part + 2 if part >= 0 else int(nth >= full)].append(block)
        for part in parts:
            indices += sorted(part)
        ends.append(len(indices))
        counts.append([len(part) for part in parts])
    count = torch.tensor(counts, dtype=torch.int32).view(*plan.offsets.shape, -1)
    return replace(
        plan,
        indices=torch.tensor(indices, dtype=torch.int32),
        offsets=torch.tensor(ends[:-1], dtype=torch.int32).view(plan.offsets.shape),
        full=count[..., 0],
        partial=count[..., 1],
        pools=Pools(factors, count[..., 2:]) if factors else None,
        hidden=hidden,
    )
