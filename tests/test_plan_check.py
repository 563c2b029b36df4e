"""Every fault that `check` and `check_for` name, made in a sound plan."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_sparse.grid import Permutation
from dit_sparse.plan import BlockPlan, Blocks, BoxPredicate, Pools
from dit_sparse.plan_check import check, check_for

TOKENS, SIZE, HEADS, BATCH = 10, 4, 3, 2


def sound() -> BlockPlan:
    """Blocks of 4, 4 and 2 tokens; every row lists 0 and 1 as full and 2 as partial."""
    blocks = Blocks.uniform(TOKENS, SIZE)
    visited = torch.ones(BATCH, HEADS, 3, 3, dtype=torch.bool)
    corner = torch.zeros(HEADS, TOKENS, dtype=torch.int32)
    key = torch.arange(TOKENS, dtype=torch.int32)
    return BlockPlan.from_mask(
        visited,
        blocks,
        blocks,
        full=torch.tensor([True, True, False]).expand_as(visited),
        box=BoxPredicate(corner, corner + 9, key, key, guard=1 << 4),
        order=Permutation(torch.randperm(TOKENS).expand(HEADS, -1)),
    )


def edited(tensor: Tensor, at: int, value: int) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[at] = value
    return changed


def with_blocks(plan: BlockPlan, starts: list[int], size: int = SIZE) -> BlockPlan:
    return replace(plan, k_blocks=Blocks(torch.tensor(starts, dtype=torch.int32), size))


def with_box(plan: BlockPlan, **changes: object) -> BlockPlan:
    assert plan.box is not None
    return replace(plan, box=replace(plan.box, **changes))


def pooled(plan: BlockPlan, *factors: object, counts: Tensor | None = None) -> BlockPlan:
    """The plan with pools that no row uses, or with the partial entries as pooled ones."""
    if counts is None:
        counts = torch.zeros(*plan.offsets.shape, len(factors), dtype=torch.int32)
    return replace(plan, pools=Pools(factors, counts))


FAULTS: dict[str, Callable[[BlockPlan], BlockPlan]] = {
    r"q_blocks\.picture to be consecutive blocks among 0 to 2, got range\(1, 4\)": lambda p: (
        replace(p, q_blocks=replace(p.q_blocks, picture=range(1, 4)))
    ),
    r"indices of dtype torch.int32, got torch.int64": lambda p: replace(
        p, indices=p.indices.long()
    ),
    r"offsets of dtype torch.int32, got torch.float32": lambda p: replace(
        p, offsets=p.offsets.float().fill_(float("nan"))
    ),
    r"box.above of dtype": lambda p: with_box(p, above=torch.zeros(TOKENS)),
    r"full on cpu, where the indices are, got meta": lambda p: replace(p, full=p.full.to("meta")),
    r"order.index on cpu": lambda p: replace(p, order=Permutation(p.order.index.to("meta"))),
    r"offsets with 3 dimensions": lambda p: replace(p, offsets=p.offsets[0]),
    r"k_blocks.starts with 1 dimensions": lambda p: replace(
        p, k_blocks=Blocks(p.k_blocks.starts[None], SIZE)
    ),
    r"k_blocks with at least one block": lambda p: with_blocks(p, [0]),
    r"k_blocks to start at 0, got 1": lambda p: with_blocks(p, [1, 4, 8, 10]),
    r"1 to 4 tokens in k_blocks, got 0 tokens in block 1": lambda p: with_blocks(p, [0, 4, 4, 8]),
    r"got -2 tokens in block 1": lambda p: with_blocks(p, [0, 4, 2, 6]),
    r"got 6 tokens in block 0": lambda p: with_blocks(p, [0, 6, 8, 10]),
    r"offsets of shape \[1 or B, 1 or H, 3\], got \[2, 3, 2\]": lambda p: replace(
        p, offsets=p.offsets[..., :2]
    ),
    r"offsets of shape \[1 or B, 1 or H, 3\], got \[0, 3, 3\]": lambda p: replace(
        p, offsets=p.offsets[:0]
    ),
    r"partial of the shape of offsets": lambda p: replace(p, partial=p.partial[:1]),
    r"full of at least 0, got -1": lambda p: replace(p, full=edited(p.full, 2, -1)),
    r"offsets of at least 0, got -3": lambda p: replace(p, offsets=edited(p.offsets, 0, -3)),
    r"rows inside the 54 indices, got one that ends at 63": lambda p: replace(
        p, offsets=edited(p.offsets, 17, 60)
    ),
    r"rows inside the 54 indices, got one that ends at 55": lambda p: replace(
        p, full=edited(p.full, 17, 3)
    ),
    r"key blocks 0 to 2, got 3": lambda p: replace(p, indices=edited(p.indices, 5, 3)),
    r"key blocks 0 to 2, got -1": lambda p: replace(p, indices=edited(p.indices, 5, -1)),
    r"ascending key blocks .* got 1 before 0": lambda p: replace(
        p, indices=edited(edited(p.indices, 3, 1), 4, 0)
    ),
    r"ascending key blocks .* got 0 before 0": lambda p: replace(
        p, indices=edited(p.indices, 4, 0)
    ),
    r"at most once in a row, got block 1 in two parts": lambda p: replace(
        p, indices=edited(p.indices, 5, 1)
    ),
    r"a box that masks the partial entries, got none": lambda p: replace(p, box=None),
    r"powers of two from 2 to 128, got \(2, 3\)": lambda p: pooled(p, 2, 3),
    r"powers of two from 2 to 128, got \(1, 2\)": lambda p: pooled(p, 1, 2),
    r"powers of two from 2 to 128, got \(256,\)": lambda p: pooled(p, 256),
    r"powers of two from 2 to 128, got \(4.0,\)": lambda p: pooled(p, 4.0),
    r"ascending pool factors .*, got \(8, 2\)": lambda p: pooled(p, 8, 2),
    r"ascending pool factors .*, got \(2, 2\)": lambda p: pooled(p, 2, 2),
    r"ascending pool factors .*, got \(\)": lambda p: pooled(p),
    r"pools.counts of shape \[2, 3, 3, 2\], .*, got \[2, 3, 3, 1\]": lambda p: pooled(
        p, 2, 4, counts=torch.zeros(2, 3, 3, 1, dtype=torch.int32)
    ),
    r"pools.counts of at least 0, got -1": lambda p: pooled(
        p, 2, counts=torch.full((2, 3, 3, 1), -1, dtype=torch.int32)
    ),
    r"54 indices, got one that ends at 55": lambda p: pooled(
        p, 2, counts=torch.ones(2, 3, 3, 1, dtype=torch.int32)
    ),
    r"pools.counts of dtype torch.int32": lambda p: pooled(
        p, 2, counts=torch.zeros(2, 3, 3, 1, dtype=torch.int64)
    ),
    r"in each part of a row .*, got 1 before 0": lambda p: pooled(
        replace(p, full=p.full - 2, indices=edited(edited(p.indices, 1, 1), 2, 0)),
        2,
        counts=torch.full((2, 3, 3, 1), 2, dtype=torch.int32),
    ),
    r"hidden of dtype torch.bool": lambda p: replace(p, hidden=torch.zeros(2, 3)),
    r"hidden of shape \[1 or B, 3\] .*, got \[2, 4\]": lambda p: replace(
        p, hidden=torch.zeros(2, 4, dtype=torch.bool)
    ),
    r"hidden of shape \[1 or B, 3\] .*, got \[5, 3\]": lambda p: replace(
        p, hidden=torch.zeros(5, 3, dtype=torch.bool)
    ),
    r"no row to list a hidden key block, got block 1": lambda p: replace(
        p, hidden=torch.tensor([[False, True, False]])
    ),
    r"box.upper of shape \[3, 10\], got \[1, 10\]": lambda p: with_box(p, upper=p.box.upper[:1]),
    r"box.below of shape \[10\], got \[9\]": lambda p: with_box(p, below=p.box.below[:9]),
    r"guard as a positive int of 31 bits, got 0": lambda p: with_box(p, guard=0),
    r"31 bits, got 2147483648": lambda p: with_box(p, guard=1 << 31),
    r"31 bits, got 16.0": lambda p: with_box(p, guard=16.0),
    r"box.lower .* guard bits of 0x10, got 0x10": lambda p: with_box(
        p, lower=edited(p.box.lower, 3, 16)
    ),
    r"box.above .* guard bits of 0x10, got -0x1": lambda p: with_box(
        p, above=edited(p.box.above, 3, -1)
    ),
    r"one number of heads.* 3 in the lists and 2 in the box": lambda p: with_box(
        p, lower=p.box.lower[:2], upper=p.box.upper[:2]
    ),
    r"3 in the box and 2 in the order": lambda p: replace(p, order=Permutation(p.order.index[:2])),
    r"got .*0 in the order": lambda p: replace(p, order=Permutation(p.order.index[:0])),
    r"queries and keys, 10 and 10, got Permutation\(9 tokens": lambda p: replace(
        p, order=Permutation(torch.arange(9))
    ),
    r"repeated or missing": lambda p: replace(
        p, order=Permutation(torch.zeros(TOKENS, dtype=torch.int64))
    ),
    r"tail among none, zeroth, first, block, got 'second'": lambda p: replace(p, tail="second"),
}


@pytest.mark.parametrize("sentence", FAULTS)
def test_check_names_the_fault(sentence):
    plan = sound()
    with pytest.raises(ValueError, match=sentence):
        check(FAULTS[sentence](plan))


def test_sound_plans_pass():
    plan = sound()
    assert check(plan) is plan
    assert check(pooled(plan, 2, 128)).pools is not None
    moved = replace(plan, partial=torch.zeros_like(plan.partial), box=None)
    assert bool(check(pooled(moved, 4, counts=plan.partial[..., None])).visited.all())
    every = BlockPlan.from_mask(plan.visited, plan.q_blocks, plan.k_blocks)
    assert check(every).box is None


def qk(batch: int = BATCH, heads: int = HEADS, n_q: int = TOKENS, n_k: int = TOKENS, **where: str):
    return torch.zeros(batch, heads, n_q, 8, **where), torch.zeros(batch, heads, n_k, 8, **where)


def test_check_for_accepts_its_tensors():
    plan = sound()
    assert check_for(plan, *qk()) is plan


def test_check_for_accepts_shared_lists_for_any_batch_and_heads():
    blocks = Blocks.uniform(TOKENS, SIZE)
    plan = BlockPlan.from_mask(torch.ones(1, 1, 3, 3, dtype=torch.bool), blocks, blocks)
    check_for(plan, *qk(batch=5, heads=7))


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (qk(n_q=11, n_k=11), "10 queries and 10 keys, got 11 and 11: the plan is for another grid"),
        (qk(n_k=9), "got 10 and 9"),
        (qk(batch=1), "Expected a batch of 2, as the plan has, got 1"),
        (qk(batch=4), "Expected a batch of 2"),
        (qk(heads=6), "Expected 3 heads, as the plan has, got 6"),
        (qk(device="meta"), r"on cpu, where the plan is, got meta"),
    ],
)
def test_check_for_refuses(tensors, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_for(sound(), *tensors)


@pytest.mark.parametrize("part", ["box", "order"])
def test_check_for_counts_the_heads_of_boxes_and_orders(part):
    plan = sound()
    one = replace(
        plan, offsets=plan.offsets[:, :1], full=plan.full[:, :1], partial=plan.partial[:, :1]
    )
    if part == "order":  # without a box nothing is partial
        one = replace(one, full=one.full + one.partial, partial=torch.zeros_like(one.partial))
    other = {"box": "order", "order": "box"}[part]
    with pytest.raises(ValueError, match="Expected 3 heads"):
        check_for(check(replace(one, **{other: None})), *qk(heads=2))
