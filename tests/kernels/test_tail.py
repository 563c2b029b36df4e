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
from dit_sparse.plan import BlockPlan, Pools
from dit_sparse.plan_check import check
from tests.block_cases import HEADS, Case, covering, plan_of, tensors_of
from tests.problems import pooled

tail = pytest.importorskip("dit_sparse.kernels.tail")
pooled_rows = pytest.importorskip("dit_sparse.kernels.pooled")
rooms = pytest.importorskip("dit_sparse.kernels.rooms")
pool = pytest.importorskip("dit_sparse.kernels.pool")
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


def added(room: Any, plan: BlockPlan, scale: float, exact: BlockPlan) -> AttentionOutput:
    """What the kernel makes of the result for the exact entries."""
    result = AttentionOutput(
        *attend(room.q, room.k, room.v, exact, scale=scale, backend="reference")
    )
    slope, (q, k, v) = None, room.ordered
    if room.centres is not None:
        slope = pool.slope(k, v, plan.k_blocks, room.centres, plan.hidden)
    assert tail.launch(q, room.means, plan, scale, result, slope)
    return result


@pytest.mark.parametrize("values", TAILS, ids=name)
def test_a_tail_of_means(values: dict):
    plan = with_tail(values)
    q, k, v = without_hidden(*(x.contiguous() for x in tensors_of(case_of(values), plan)), plan)
    assert tail.runs(q, k, v, plan)
    room, launches = rooms.in_order(
        q, k, v, plan, queries=True, bounded=values["bounded"], means=True
    )
    assert len(launches) == 1  # order, means and lengths in one pass
    assert (room.moved is None) == (plan.order is None)  # what is in order is not copied
    assert (room.centres is None) == (plan.tail == "zeroth")
    exact = replace(plan, tail="none")
    compare(added(room, plan, q.shape[-1] ** -0.5, exact), q, k, v, plan)


def test_rows_that_no_descriptor_addresses():
    """66 numbers of 16 bits are no multiple of 16 bytes: another kernel takes them."""
    values = {"head_dim": 66, "ragged": False, "order": "none", "lists": "head", "hidden": False}
    plan = with_tail({**values, "bounded": False, "tail": "zeroth"})
    given = tensors_of(case_of(values), plan)
    assert not tail.runs(*given, plan)
    plan = replace(plan, tail="none", pools=Pools((4,), plan.full[..., None]))
    wide = [torch.nn.functional.pad(x, (0, 6))[..., :66] for x in given]
    result = AttentionOutput(*(torch.empty(0) for _ in range(2)))
    assert not pooled_rows.launch(*wide, plan, 1.0, result)


@pytest.mark.parametrize("visited", [True, False])
def test_a_tail_with_a_slope_that_stands_for_nothing_or_for_everything(visited: bool):
    """A share of 0 divides nothing away, and one of 1 needs no result so far."""
    case = Case(64, 128, 128, dtype=torch.float16, box=False, ragged=True)
    plan, scale = plan_of(case), 0.1
    seen = torch.full((1, 1, plan.q_blocks.n, plan.k_blocks.n), visited)
    plan = BlockPlan.from_mask(seen, plan.q_blocks, plan.k_blocks)
    q, k, v = (x.contiguous() for x in tensors_of(case, plan))
    plan = check(replace(plan, tail="first"))
    room, _ = rooms.in_order(q, k, v, plan, queries=True, bounded=False, means=True)
    got = added(room, plan, scale, replace(plan, tail="none"))
    out, lse = attend(*(x.double() for x in (q, k, v)), plan, scale=scale, backend="reference")
    torch.testing.assert_close(got.out.double(), out, rtol=1e-2, atol=4e-3)
    torch.testing.assert_close(got.lse, lse, rtol=2e-3, atol=2e-3)


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
