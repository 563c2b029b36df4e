"""Pooled entries and tails in Triton's interpreter, against the reference in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_sparse.attention import attend
from dit_sparse.backend import AttentionOutput, Backend
from dit_sparse.causal import plan_of_causal_levels
from dit_sparse.levels import plan_of_levels
from dit_sparse.plan import BlockPlan, Blocks, Tail
from dit_sparse.plan_check import check
from tests.block_cases import BATCH, HEADS, Case, covering, plan_of, tensors_of
from tests.problems import Boxes, pooled

block_sparse = pytest.importorskip("dit_sparse.kernels.block_sparse")
tiles = pytest.importorskip("dit_sparse.kernels.tiles")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter"),
    pytest.mark.usefixtures("poisoned"),
]

FACTORS: dict[str, tuple[int, ...]] = {
    "none": (),
    "pyramid": (2, 4, 8),
    "one": (4,),
    "wide": (16, 128),  # also wider than some blocks
}
# Every choice of values for any two of these factors occurs in some case.
CASES = covering(
    {
        "head_dim": [32, 72, 128, 256],
        "q_block": [16, 64, 128],
        "k_block": [16, 32, 64, 128],
        "dtype": [torch.float32, torch.float16],
        "ragged": [True, False],
        "box": [True, False],
        "order": ["none", "shared", "head"],
        "lists": ["shared", "head", "batch"],
        "factors": list(FACTORS),
        "tail": ["none", "zeroth", "first", "block"],
        "hidden": [True, False],
    },
    strength=2,
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


def interpreted(keys: int | None = None) -> Backend:
    tile = None if keys is None else tiles.Tile(keys, warps=4, stages=1, tma=False)
    return block_sparse.TritonBackend(tile=tile, interpreted=True)


def compare(got: AttentionOutput, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> None:
    """The specification's measure: relative Frobenius error, and no element far off."""
    out, lse = attend(q.double(), k.double(), v.double(), plan, backend="reference")
    tolerance = TOLERANCE[q.dtype]
    assert bool(out.isfinite().all())
    assert float((got.out.double() - out).norm()) <= tolerance * float(out.norm())
    torch.testing.assert_close(got.out.double(), out, rtol=5 * tolerance, atol=5 * tolerance)
    torch.testing.assert_close(got.lse, lse, rtol=tolerance, atol=tolerance)
    assert not got.out[lse == -torch.inf].any()


@pytest.mark.parametrize("values", CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_every_variant(values: dict):
    options = dict(values)
    factors, tail = FACTORS[options.pop("factors")], options.pop("tail")
    generator = torch.Generator().manual_seed(3)
    with_hidden = options.pop("hidden")
    case = Case(**options)
    plan = plan_of(case)
    hidden = None
    if with_hidden:
        hidden = torch.rand(plan.offsets.shape[0], plan.k_blocks.n, generator=generator) < 0.3
    plan = check(replace(pooled(plan, factors, hidden, generator), tail=tail))
    q, k, v = tensors_of(case, plan)
    if hidden is not None and not case.ragged:  # tiles of short blocks reach into the next one
        unseen = hidden[:, plan.k_blocks.of_token][:, None, :, None].expand(*k.shape[:3], 1)
        unseen = unseen if plan.order is None else plan.order.undo(unseen)
        k, v = (x.masked_fill(unseen, float("nan")) for x in (k, v))
    got = attend(q, k, v, plan, backend=interpreted(case.tile_keys))
    compare(got, q, k, v, plan)


def blocks_of(size: int, ragged: bool) -> Blocks:
    return Blocks.of_runs([size * 2 + 1, size, 5] if ragged else [size * 4], size)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("factor", [2, 4, 8, 16, 32, 64, 128])
def test_every_block_and_factor(size: int, factor: int):
    """All entries of one factor: few rows of many blocks in a tile, or a block in many tiles."""
    for ragged in (False, True):
        blocks = blocks_of(size, ragged)
        generator = torch.Generator().manual_seed(factor)
        shown = torch.rand(1, HEADS, 2, blocks.n, generator=generator) < 0.8
        level = shown.to(torch.uint8) * factor
        queries = Blocks.of_runs([9, 4], 16)
        plan = check(plan_of_levels(level, queries, blocks, factors=(factor,)))
        q, k, v = tensors_of(Case(32, 16, size), plan)
        compare(attend(q, k, v, plan, backend=interpreted(16)), q, k, v, plan)


@pytest.mark.parametrize("tail", ["zeroth", "first", "block"])
@pytest.mark.parametrize("number", [1, 63, 64, 65, 200])
def test_many_blocks_behind_a_late_maximum(tail: Tail, number: int):
    """T8: one unlisted block near the end far above all others; the sums so far must shrink."""
    blocks = Blocks.of_runs([16 * number + 3], 16)
    level = torch.zeros(1, 1, 1, blocks.n, dtype=torch.uint8)
    level[..., 0] = 1
    plan = plan_of_levels(level, Blocks.uniform(7, 16), blocks, tail=tail)
    q, k, v = tensors_of(Case(16, 16, 16), plan)
    q = q.abs()
    late = blocks.starts[blocks.n * 7 // 8]
    k[:, :, late : late + 16] = 4 + 0.1 * k[:, :, late : late + 16]
    v[:, :, late : late + 16] += 3
    compare(attend(q, k, v, plan, backend=interpreted(16)), q, k, v, plan)


@pytest.mark.parametrize("tail", ["none", "zeroth", "first", "block"])
def test_extreme_scores_and_a_common_offset(tail: Tail):
    generator = torch.Generator().manual_seed(0)
    plan = pooled(plan_of(Case(32, 32, 32)), (2, 8), None, generator)
    plan = replace(plan, tail=tail)
    q, k, v = tensors_of(Case(32, 32, 32), plan)
    got = attend(q.sign() * 300, k.sign(), v, plan, scale=1.0, backend=interpreted(32))
    assert bool(got.out.isfinite().all())
    assert not bool(got.lse.isnan().any())
    plain = attend(q, k, v, plan, backend=interpreted(32))
    moved = attend(q, k + 30, v, plan, backend=interpreted(32))
    torch.testing.assert_close(moved.out, plain.out, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_zeroth_order_is_the_pyramid_of_one_and_the_block(dtype: torch.dtype):
    """T11: the tail's dense pass and pooled lists are two ways to say the same."""
    blocks, queries = blocks_of(64, ragged=True), Blocks.of_runs([40], 32)
    exact = torch.rand(BATCH, HEADS, queries.n, blocks.n) < 0.4
    tail = plan_of_levels(exact.to(torch.uint8), queries, blocks, tail="zeroth")
    level = torch.where(exact, 1, 64).to(torch.uint8)
    lists = plan_of_levels(level, queries, blocks, factors=(64,))
    q, k, v = tensors_of(Case(32, 32, 64, dtype), tail)
    a, b = (attend(q, k, v, plan, backend=interpreted()) for plan in (tail, lists))
    torch.testing.assert_close(a.out, b.out, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(a.lse, b.lse, rtol=1e-4, atol=1e-4)


def test_causal_levels():
    blocks = blocks_of(32, ragged=True)
    level = torch.tensor([0, 1, 2, 8], dtype=torch.uint8)
    level = level[torch.randint(4, (1, HEADS, blocks.n, blocks.n))]
    plan = check(plan_of_causal_levels(level, blocks, factors=(2, 8)))
    q, k, v = tensors_of(Case(32, 32, 32), plan)
    compare(attend(q, k, v, plan, backend=interpreted(16)), q, k, v, plan)


def test_a_plan_with_room_to_spare():
    """Padded rows need no count of entries on the host."""
    blocks = blocks_of(32, ragged=True)
    level = torch.tensor([0, 1, 2, 8], dtype=torch.uint8)[torch.randint(4, (2, 2, 1, blocks.n))]
    queries = Blocks.uniform(9, 16)
    packed = plan_of_levels(level, queries, blocks, factors=(2, 8), tail="first")
    padded = plan_of_levels(level, queries, blocks, factors=(2, 8), tail="first", room=blocks.n)
    assert check(padded).indices.numel() == 4 * blocks.n
    assert torch.equal(packed.visited, padded.visited)
    assert padded.density == packed.density
    q, k, v = tensors_of(Case(32, 16, 32), packed)
    a, b = (attend(q, k, v, plan, backend=interpreted()) for plan in (packed, padded))
    assert torch.equal(a.out, b.out)
    assert torch.equal(a.lse, b.lse)


@pytest.mark.parametrize("tail", ["zeroth", "first", "block"])
def test_rows_that_read_nothing_see_no_nan_of_a_slope(tail: Tail):
    """Rows that list all blocks and are shown none of them, beside values that are not numbers."""
    blocks = Blocks.uniform(32, 16)
    visited = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    nowhere = Boxes(
        bits=(3,),
        low=torch.zeros(1, 32, 1, dtype=torch.int64),
        high=torch.zeros(1, 32, 1, dtype=torch.int64),
        key=torch.ones(32, 1, dtype=torch.int64),
        text=torch.zeros(32, dtype=torch.bool),
    ).packed()
    plan = BlockPlan.from_mask(visited, blocks, blocks, full=~visited, box=nowhere, tail=tail)
    q, k, v = tensors_of(Case(32, 16, 16), check(plan))
    v[:, :, 3] = float("nan")
    for backend in (interpreted(16), "reference"):
        got = attend(q, k, v, plan, backend=backend)
        assert bool((got.lse == -torch.inf).all())
        assert bool((got.out == 0).all())
