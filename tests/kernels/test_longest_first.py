"""The order in which query blocks begin: the longest lists first, and the same results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.backend import AttentionOutput
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.method import CallContext
from dit_sparse.methods.sta import SlidingTileMethod
from dit_sparse.methods.window import WindowMethod
from dit_sparse.plan import BlockPlan, Blocks
from tests.block_cases import Case, plan_of, tensors_of

hopper = pytest.importorskip("dit_sparse.kernels.hopper")
launching = pytest.importorskip("dit_sparse.kernels.launch")
module = pytest.importorskip("dit_sparse.kernels.longest_first")
portable = pytest.importorskip("dit_sparse.kernels.portable")
tiles = pytest.importorskip("dit_sparse.kernels.tiles")

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter"),
    pytest.mark.usefixtures("poisoned"),
]
specialised = pytest.mark.skipif(
    launching.TensorDescriptor is None, reason="needs tensor descriptors, of Triton 3.4 and later"
)


def lists(shape: tuple[int, int, int], key_blocks: int, *, partial: bool = False) -> BlockPlan:
    """A plan of which only the lengths of the lists mean anything."""
    source = torch.Generator().manual_seed(0)
    share = torch.rand(shape, generator=source) ** 4  # few long ones
    count = (share * (key_blocks + 1)).int().clamp(max=key_blocks)
    count[0, 0, :2] = torch.tensor([0, key_blocks])[: shape[2]]
    masked = count // 3 if partial else torch.zeros_like(count)
    return BlockPlan(
        q_blocks=Blocks.uniform(shape[2] * 16, 16),
        k_blocks=Blocks.uniform(key_blocks * 16, 16),
        indices=torch.zeros(key_blocks, dtype=torch.int32),
        offsets=torch.zeros_like(count),
        full=count - masked,
        partial=masked,
        uneven=True,
    )


def bucket(entries: Tensor, key_blocks: int) -> Tensor:
    """0 for all key blocks, one more for every quarter that leads to half of them."""
    mantissa, exponent = torch.frexp(entries.double().clamp(min=2.0**-60))
    top, most = torch.frexp(torch.tensor(float(key_blocks), dtype=torch.float64))
    steps = (most * 4 + (top * 8).floor()) - (exponent * 4 + (mantissa * 8).floor())
    return steps.clamp(0, module.BUCKETS - 1).long()


@pytest.mark.parametrize(
    ("shape", "key_blocks", "batch", "heads"),
    [
        ((1, 1, 1), 1, 1, 1),
        ((1, 3, 40), 33, 1, 3),
        ((1, 1, 70), 900, 2, 3),  # lists that all heads and both entries share
        ((2, 1, 128), 128, 2, 4),
        ((1, 5, 430), 430, 1, 5),  # more tiles than are counted at a time
        ((2, 3, 129), 5, 2, 3),
    ],
)
@pytest.mark.parametrize("partial", [False, True])
def test_the_longest_lists_come_first(
    shape: tuple[int, int, int], key_blocks: int, batch: int, heads: int, partial: bool
) -> None:
    plan = lists(shape, key_blocks, partial=partial)
    queue = module.longest_first(plan, batch, heads)
    count = plan.count.expand(batch, heads, -1).reshape(-1)
    assert queue.dtype == torch.int32
    assert torch.equal(queue.long(), bucket(count, key_blocks).argsort(stable=True))
    if shape[2] > 1:
        assert count[queue[0]] == key_blocks
        assert count[queue[-1].long()] <= key_blocks / 4


def test_rows_at_the_sides_of_a_bucket() -> None:
    """A list of 32 is in the bucket of 39, and 31 in the next one; a list of none in the last."""
    plan = lists((1, 1, 7), 64)
    plan.full[0, 0] = torch.tensor([0, 31, 39, 32, 64, 40, 1])
    assert module.longest_first(plan, 1, 1).tolist() == [4, 5, 2, 3, 1, 6, 0]


@pytest.mark.parametrize("batch", [1, 2])
def test_launches_of_full_and_of_masked_entries_have_orders_of_their_own(batch: int) -> None:
    """A launch of masked entries has places for the query blocks that have some in any head."""
    plan = lists((1, 3, 60), 100, partial=True)
    plan.partial[:, :, 5:9] = 0
    rows = plan.masked_rows.long()
    assert 0 < len(rows) < 56
    masked = plan.partial[..., rows]
    for part, count in (("full", plan.full), ("partial", masked), ("all", plan.count)):
        queue = module.longest_first(plan, batch, 3, part)
        every = count.expand(batch, 3, -1).reshape(-1)
        assert torch.equal(queue.long(), bucket(every, 100).argsort(stable=True)), part
        assert module.longest_first(plan, batch, 3, part) is queue


def test_a_queue_is_made_once_for_each_number_of_heads() -> None:
    plan = lists((1, 1, 20), 20)
    first = module.longest_first(plan, 1, 2)
    assert module.longest_first(plan, 1, 2) is first
    assert len(module.longest_first(plan, 2, 2)) == 2 * len(first)


def test_even_lists_need_no_queue() -> None:
    assert module.longest_first(replace(lists((1, 1, 20), 20), uneven=False), 1, 1) is None


@pytest.mark.parametrize("order", ["none", "head"])
@pytest.mark.parametrize("queries", [32, 64])
@pytest.mark.parametrize("heads", ["shared", "batch"])
def test_the_portable_kernel_computes_the_same(order: str, queries: int, heads: str) -> None:
    case = Case(32, 64, 64, torch.float16, order=order, lists=heads)
    plan = plan_of(case)
    q, k, v = tensors_of(case, plan)
    if plan.order is not None:
        k, v = plan.order(k), plan.order(v)
    tile = tiles.Tile(32, warps=4, stages=1, tma=False, queries=queries)

    def run(uneven: bool) -> AttentionOutput:
        result = room(q)
        given = replace(plan, uneven=uneven)
        portable.launch(q, k, v, given, 32**-0.5, tile, result)
        assert ("_longest_first" in vars(given)) == uneven
        return result

    assert_same(run(False), run(True))


@specialised
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("text", [(0, 0), (150, 3)])
def test_the_specialised_kernel_computes_the_same(masked: bool, text: tuple[int, int]) -> None:
    """Also around a picture, whose neighbours have programs of their own."""
    layout = TokenLayout.of(TokenGrid(1, 21, 32), *text)
    method: Any = SlidingTileMethod(window=((1, 1), (9, 1)), tile=(4, 32))
    if masked:
        method = WindowMethod(window=((4, 32), (21, 32)), stride=(2, 32), tile=(4, 32))
    plan = method.plan(*[torch.empty(1)] * 2, CallContext(layout))
    q, k, v = (plan.order(x) for x in tensors_of(Case(64, 128, 128, torch.float16), plan))
    assert plan.order is not None
    mask = plan.mask_product
    assert (mask is not None) == masked

    def run(uneven: bool) -> AttentionOutput:
        result = room(q)
        given = replace(plan, uneven=uneven)
        assert hopper.launch(q, k, v, given, 0.125, result, mask=mask)
        assert ("_longest_first" in vars(given)) == uneven
        return result

    assert_same(run(False), run(True))


def room(q: Tensor) -> AttentionOutput:
    return AttentionOutput(torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32))


def assert_same(a: AttentionOutput, b: AttentionOutput) -> None:
    assert not bool(a.out.isnan().any())
    assert torch.equal(a.out, b.out)
    assert torch.equal(a.lse, b.lse)
