"""Tails and pooled rows in the specialised kernels, in Triton's interpreter, against the reference
in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.attention import attend
from dit_sparse.backend import AttentionOutput
from dit_sparse.plan import BlockPlan
from dit_sparse.plan_check import check
from tests.block_cases import HEADS, Case, covering, plan_of, tensors_of
from tests.problems import pooled

tail = pytest.importorskip("dit_sparse.kernels.tail")
pooled_rows = pytest.importorskip("dit_sparse.kernels.pooled")
block_sparse = pytest.importorskip("dit_sparse.kernels.block_sparse")
portable = pytest.importorskip("dit_sparse.kernels.portable")
slope = pytest.importorskip("dit_sparse.kernels.slope")
tiles = pytest.importorskip("dit_sparse.kernels.tiles")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter"),
    pytest.mark.usefixtures("poisoned"),
]

COMMON = {
    "head_dim": [64, 72],
    "ragged": [True, False],
    "order": ["none", "shared", "head"],
    "lists": ["shared", "head", "batch"],
    "hidden": [True, False],
}
TAILS = covering({**COMMON, "bounded": [True, False], "tail": ["zeroth", "first"]}, strength=2)
POOLS = covering({**COMMON, "factors": [(2, 4, 8), (4,), (2, 128), (8, 16)]}, strength=2)


def name(values: dict) -> str:
    return "-".join(map(str, values.values()))


def case_of(values: dict) -> Case:
    given = {name: values[name] for name in ("head_dim", "ragged", "order", "lists")}
    return Case(q_block=128, k_block=128, dtype=torch.float16, box=False, **given)


def hidden_of(plan: BlockPlan) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(2, plan.k_blocks.n, generator=generator) < 0.3


def without_hidden(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """What padding holds is nobody's concern, but for tiles of short blocks that reach into it."""
    if plan.hidden is None or plan.k_blocks.ragged:
        return q, k, v
    unseen = plan.hidden[:, plan.k_blocks.of_token][:, None, :, None].expand(*k.shape[:3], 1)
    unseen = unseen if plan.order is None else plan.order.undo(unseen)
    return q, k.masked_fill(unseen, float("nan")), v.masked_fill(unseen, float("nan"))


def compare(got: AttentionOutput, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> None:
    out, lse = attend(q.double(), k.double(), v.double(), plan, backend="reference")
    assert float((got.out.double() - out).norm()) <= 4e-3 * float(out.norm())
    torch.testing.assert_close(got.out.double(), out, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(got.lse, lse, rtol=4e-3, atol=4e-3)
    assert not got.out[lse == -torch.inf].any()


def with_tail(values: dict) -> BlockPlan:
    plan = plan_of(case_of(values))
    if values["hidden"]:
        hidden = hidden_of(plan)
        shown = plan.visited & ~hidden[:, None, None]
        lists = BlockPlan.from_mask(shown, plan.q_blocks, plan.k_blocks, order=plan.order)
        plan = replace(lists, hidden=hidden)
    return check(replace(plan, tail=values["tail"]))


def repair(q: Tensor, room: Any, biases: Any, plan: BlockPlan, scale: float) -> None:
    tile = tiles.Tile(64, 4, 1, tma=False)
    _, k, v = room.ordered
    left = {"part": "repair", "means": biases, "share": room.share}
    portable.launch(q, k, v, plan, scale, tile, room.result, **left)


@pytest.mark.parametrize("values", TAILS, ids=name)
def test_listed_blocks_and_a_tail_in_one_loop(values: dict):
    plan = with_tail(values)
    q, k, v = without_hidden(*(x.contiguous() for x in tensors_of(case_of(values), plan)), plan)
    scale, bounded = q.shape[-1] ** -0.5, values["bounded"]
    if bounded:  # what is far below its bound has no weight in float16
        q = q / 8
    assert tail.runs(q, k, v, plan)
    room, launches = block_sparse._in_order(
        q, k, v, plan, queries=True, bounded=bounded, means=tail.rows(plan)
    )
    assert len(launches) == 1  # order, means and lengths in one pass
    biases = tail.bias_of(plan, scale, torch.float32)
    assert tail.launch(*room.ordered, biases, plan, scale, *room[5:])
    if bounded:  # rows without any mass are among those that are left
        repair(q, room, biases, plan, scale)
    assert (room.share is None) == (plan.tail == "zeroth")
    if room.share is not None:
        slope.add(q, *room.ordered[1:], plan, scale, room.share, room.result.out)
    compare(room.result, q, k, v, plan)


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("order", ["none", "head"])
def test_rows_far_below_their_bound_are_computed_again_with_their_tail(ragged: bool, order: str):
    values = {"head_dim": 64, "ragged": ragged, "order": order, "lists": "batch", "hidden": False}
    values["tail"] = "first" if ragged else "zeroth"
    plan = with_tail(values)
    q, k, v = (x.contiguous() for x in tensors_of(case_of(values), plan))
    q, k = 24 * q, k.clone()
    k[:, :, 0] *= 30  # one key makes the bound useless for all rows that do not point its way
    scale = 64**-0.5
    room, _ = block_sparse._in_order(
        q, k, v, plan, queries=True, bounded=True, means=tail.rows(plan)
    )
    biases = tail.bias_of(plan, scale, torch.float32)
    assert tail.launch(*room.ordered, biases, plan, scale, *room[5:])
    assert bool((room.result.lse == torch.inf).any())
    repair(q, room, biases, plan, scale)
    if room.share is not None:
        slope.add(q, *room.ordered[1:], plan, scale, room.share, room.result.out)
    compare(room.result, q, k, v, plan)


@pytest.mark.parametrize("kind", ["zeroth", "first"])
def test_a_kernel_that_is_refused_leaves_all_to_the_portable_ones(
    kind: str, monkeypatch: pytest.MonkeyPatch
):
    values = {"head_dim": 64, "ragged": True, "order": "head", "lists": "batch", "hidden": False}
    plan = with_tail(values | {"tail": kind})
    q, k, v = (x.contiguous() for x in tensors_of(case_of(values), plan))
    scale = 64**-0.5
    room, _ = block_sparse._in_order(
        q, k, v, plan, queries=True, bounded=False, means=tail.rows(plan)
    )
    monkeypatch.setattr(tail, "launch_specialised", lambda *_, **__: None)
    biases = tail.bias_of(plan, scale)
    assert tail.launch(*room.ordered, biases, plan, scale, *room[5:]) is None
    _, k_ordered, v_ordered = room.ordered  # with means behind them, which nobody reads
    tile = tiles.Tile(64, 4, 1, tma=False)
    portable.launch(q, k_ordered, v_ordered, plan, scale, tile, room.result)
    block_sparse._approximate(plan, scale, False, True, room)
    compare(room.result, q, k, v, plan)


@pytest.mark.parametrize("values", POOLS, ids=name)
def test_pooled_rows_in_tiles(values: dict):
    generator = torch.Generator().manual_seed(3)
    plan = plan_of(case_of(values))
    hidden = hidden_of(plan)[: plan.offsets.shape[0]] if values["hidden"] else None
    plan = check(pooled(plan, values["factors"], hidden, generator))
    q, k, v = without_hidden(*(x.contiguous() for x in tensors_of(case_of(values), plan)), plan)
    scale = q.shape[-1] ** -0.5
    exact = replace(plan, pools=None)
    result = AttentionOutput(*attend(q, k, v, exact, scale=scale, backend="reference"))
    ordered = (q, k, v) if plan.order is None else tuple(plan.order(x) for x in (q, k, v))
    assert pooled_rows.launch(*ordered, plan, scale, result)
    compare(result, q, k, v, plan)


@pytest.mark.parametrize("ragged", [True, False])
def test_tiles_of_all_levels(ragged: bool):
    """128 keys are 2, 1 and, each row of it twice, 1 tile of 32 rows, for the factors 2, 4, 8."""
    generator = torch.Generator().manual_seed(0)
    plan = plan_of(Case(64, 128, 128, box=False, ragged=ragged))
    plan = pooled(plan, (2, 4, 8), None, generator)
    assert plan.pools is not None
    lists = pooled_rows.lists_of(plan, plan.pools)
    n, lengths = plan.k_blocks.n, plan.k_blocks.lengths.tolist()
    flat = zip(
        plan.offsets.flatten().tolist(),
        (plan.full + plan.partial).flatten().tolist(),
        plan.pools.counts.reshape(-1, 3).tolist(),
        lists.counts.flatten().tolist(),
        strict=True,
    )
    assert lists.counts.shape[1] == HEADS

    def tile(number: int, s: int, left: int, most: int) -> int:
        return number << 11 | s << 8 | min(max(left, 0), most)

    for first, exact, (halves, quarters, eighths), count in flat:
        entries = plan.indices[first + exact :].tolist()
        expected = [
            tile(2 * j + part, 1, lengths[j] - 64 * part, 64)
            for j in entries[:halves]
            for part in (0, 1)
        ]
        expected += [tile(2 * n + j, 2, lengths[j], 128) for j in entries[halves:][:quarters]]
        after = entries[halves + quarters :][:eighths]
        expected += [tile(3 * n + j, 3, lengths[j], 128) for j in after]
        start = first * lists.per_entry
        assert lists.tiles[start : start + count].tolist() == expected
