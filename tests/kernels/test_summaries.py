"""One pass over q, k and v in Triton's interpreter, against the definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_sparse import correction
from dit_sparse.attention import attend
from dit_sparse.backend import AttentionOutput
from dit_sparse.plan import BlockPlan, Blocks
from dit_sparse.plan_check import check
from tests.block_cases import Case, plan_of, tensors_of

summaries = pytest.importorskip("dit_sparse.kernels.summaries")
rooms = pytest.importorskip("dit_sparse.kernels.rooms")
pool = pytest.importorskip("dit_sparse.kernels.pool")
tail = pytest.importorskip("dit_sparse.kernels.tail")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter"),
    pytest.mark.usefixtures("poisoned"),
]

BLOCKS = {
    "whole": Blocks.uniform(128, 32),
    "ragged end": Blocks.uniform(70, 64),
    "one token": Blocks.uniform(1, 16),
    "short anywhere": Blocks.of_runs([5, 128, 1, 33], 128),
}


def tokens(blocks: Blocks, dim: int, seed: int, dtype: torch.dtype) -> Tensor:
    """`[B, H, N, D]` in memory of `[B, N, H, D]`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, blocks.total, 3, dim, generator=generator)
    return x.to(dtype).transpose(1, 2)


def by_block(x: Tensor, blocks: Blocks) -> list[Tensor]:
    return list(x.split(blocks.lengths.tolist(), dim=2))


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("hiding", [0, 1, 2])
@pytest.mark.parametrize(("dim", "values"), [(16, True), (40, False), (72, True)])
def test_summaries(kind: str, hiding: int, dim: int, values: bool):
    blocks = BLOCKS[kind]
    q, k, v = (tokens(blocks, dim, seed, torch.float16) for seed in range(3))
    hidden = torch.zeros(1, blocks.n, dtype=torch.bool)
    if hiding:
        hidden = torch.rand(hiding, blocks.n, generator=torch.Generator().manual_seed(0)) < 0.4
    unseen = hidden[:, blocks.of_token][:, None, :, None]
    k, v = (x.masked_fill(unseen, float("nan")) for x in (k, v))
    got = summaries.measure(q, k, v, blocks, hidden if hiding else None, values=values)

    close = {"rtol": 1e-5, "atol": 1e-6}
    scaled = correction.block_means(q.double(), blocks) * dim**-0.5
    torch.testing.assert_close(got.queries.double(), scaled, **close)
    shown = ~hidden.expand(2, -1)[:, None].expand(2, 3, -1)
    means = [correction.block_means(x.double(), blocks) for x in (k, v)]
    torch.testing.assert_close(got.keys.double()[shown], means[0][shown], **close)
    torch.testing.assert_close(got.lengths.double(), q.double().norm(dim=-1), **close)
    longest = [x.double().norm(dim=-1).amax(-1) for x in by_block(k, blocks)]
    expected = torch.stack(longest, -1).masked_fill(~shown, 0.0)
    torch.testing.assert_close(got.longest.double(), expected, **close)
    assert (got.means is not None) == values
    if got.means is not None:
        assert got.means.dtype == k.dtype
        both = torch.stack(means).masked_fill(~shown[..., None], 0.0)
        torch.testing.assert_close(got.means.double(), both, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["zeroth", "first", "none"])
@pytest.mark.parametrize("ragged", [True, False])
def test_a_call_with_summaries_has_the_room_of_one_without(kind: str, ragged: bool):
    """Means, centres and lengths are those that the backend would measure itself."""
    case = Case(64, 128, 128, dtype=torch.float16, box=False, ragged=ragged)
    plan = check(replace(plan_of(case), tail=kind))
    q, k, v = (x.contiguous() for x in tensors_of(case, plan))
    found = summaries.measure(q, k, v, plan.k_blocks, None, values=kind != "none")
    means = kind != "none"
    asked = {"queries": True, "bounded": True, "means": means}
    got, nothing = rooms.in_order(q, k, v, plan, **asked, summaries=found)
    assert not nothing
    room, launches = rooms.in_order(q, k, v, plan, **asked)
    assert len(launches) == 1
    for one, other in zip(got.lengths, room.lengths, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    for one, other in ((got.means, room.means), (got.centres, room.centres)):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    if means:
        compare_tails(got, plan, q, k, v)


def compare_tails(room: object, plan: BlockPlan, q: Tensor, k: Tensor, v: Tensor) -> None:
    """The tail over these summaries, against the reference in float64."""
    scale = q.shape[-1] ** -0.5
    exact = attend(q, k, v, replace(plan, tail="none"), scale=scale, backend="reference")
    result, slope = AttentionOutput(*exact), None
    if room.centres is not None:
        slope = pool.slope(k, v, plan.k_blocks, room.centres, plan.hidden)
    tail.launch(q, room.means, plan, scale, result, slope)
    out, lse = attend(*(x.double() for x in (q, k, v)), plan, scale=scale, backend="reference")
    torch.testing.assert_close(result.out.double(), out, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(result.lse, lse, rtol=4e-3, atol=4e-3)
