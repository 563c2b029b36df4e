"""The quantising pass in Triton against its meaning in PyTorch."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dit_sparse.grid import Permutation
from dit_sparse.kernels.emulated import round_blocks, round_channels
from dit_sparse.plan import BlockPlan, Blocks
from tests.block_cases import LAYOUTS

quantise = pytest.importorskip("dit_sparse.kernels.quantise").quantise
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, Triton's interpreter runs
# The interpreter's conversion to e4m3 drops carries and small numbers, so that up to a whole
# binade is lost; on a GPU it rounds to the nearest.
E4M3 = {"rtol": 1 / 15, "atol": 2e-2} if DEVICE == "cuda" else {"rtol": 0.5, "atol": 0.1}


def problem(
    dim: int = 32, order: str = "none", runs: tuple[int, ...] = (140, 71), value_dim: int = 32
) -> tuple[Tensor, Tensor, Tensor, BlockPlan]:
    generator = torch.Generator().manual_seed(dim)
    tokens, size = sum(runs), 32
    blocks = Blocks.of_runs(runs, size)
    index = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(3)])
    orders = {"none": None, "shared": Permutation(index[0]), "head": Permutation(index)}
    mask = torch.ones(1, 1, blocks.n, blocks.n, dtype=torch.bool)
    plan = BlockPlan.from_mask(mask, blocks, blocks, order=orders[order])
    q, k, v = (
        torch.randn(2, 3, tokens, d, generator=generator).to(DEVICE) for d in (dim, dim, value_dim)
    )
    return q, k + 3, v * 2 - 5, plan.to(DEVICE)


def rows_of(stored: Tensor, steps: Tensor, blocks: Blocks, dim: int) -> Tensor:
    """Blocks put behind one another again, multiplied by their steps."""
    whole = stored.float() * steps[..., None, None]
    lengths = blocks.lengths.tolist()
    return torch.cat([whole[:, :, j, :n, :dim] for j, n in enumerate(lengths)], 2)


def columns_of(stored: Tensor, blocks: Blocks) -> Tensor:
    lengths = blocks.lengths.tolist()
    return torch.cat([stored[:, :, j, :, :n].float() for j, n in enumerate(lengths)], -1).mT


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("order", ["none", "shared", "head"])
@pytest.mark.parametrize("dim", [16, 24])
def test_integers(order: str, dim: int):
    q, k, v, plan = problem(dim, order)
    got = quantise(q, k, v, plan, integers=True)
    if plan.order is not None:
        q, k = plan.order(q), plan.order(k)
    centre = got.centres[:, :, None, 0, :dim]
    torch.testing.assert_close(centre, k.mean(2, keepdim=True))
    for x, stored, steps in ((q, got.q, got.q_step), (k - centre, got.k, got.k_step)):
        assert stored.dtype == torch.int8
        expected = round_blocks(x, plan.q_blocks, "int8")
        same = torch.isclose(rows_of(stored, steps, plan.q_blocks, dim), expected, atol=1e-5)
        assert same.float().mean() > 0.999  # a quotient half way may fall on either side
    expected = (q * centre).sum(-1)
    torch.testing.assert_close(got.shift, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("order", ["none", "head"])
@pytest.mark.parametrize("value_dim", [24, 32])
def test_e4m3(order: str, value_dim: int):
    q, k, v, plan = problem(32, order, value_dim=value_dim)
    got = quantise(q, k, v, plan)
    if plan.order is not None:
        k, v = plan.order(k), plan.order(v)
    k = k - got.centres[:, :, None, 0]
    centre, step = got.centres[:, :, None, 1, :value_dim], got.centres[:, :, None, 2, :value_dim]
    torch.testing.assert_close(centre, v.mean(2, keepdim=True))
    torch.testing.assert_close(step, (v - centre).abs().amax(2, keepdim=True) / 448)
    assert not got.excess.any()
    torch.testing.assert_close(rows_of(got.k, got.k_step, plan.k_blocks, 32), k, **E4M3)
    values = columns_of(got.v[:, :, :, :value_dim], plan.k_blocks) * step
    torch.testing.assert_close(values, v - centre, **E4M3)
    if DEVICE == "cuda":
        expected = round_channels(v - centre)
        assert torch.isclose(values, expected, rtol=1e-3).float().mean() > 0.999


@pytest.mark.usefixtures("poisoned")
def test_padding():
    """What a short block lacks has no value, and the scores of its last key."""
    q, k, v, plan = problem(24, value_dim=24)
    got = quantise(q, k, v, plan, integers=True)
    for j, (start, stop) in enumerate(pairwise(plan.k_blocks.starts.tolist())):
        length = stop - start
        assert not got.v[:, :, j, :, length:].float().any()
        for stored in (got.q, got.k):
            assert (stored[:, :, j, length:] == stored[:, :, j, length - 1 : length]).all()
            assert not stored[:, :, j, :, 24:].any()
    assert not got.v[:, :, :, 24:].float().any()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("order", ["none", "shared", "head"])
def test_hidden_keys_have_no_part_in_means_and_steps(order: str):
    q, k, v, plan = problem(order=order, runs=(140, 71, 40))
    last = plan.k_blocks.n - 1
    hidden = torch.zeros(2, plan.k_blocks.n, dtype=torch.bool, device=DEVICE)
    hidden[1, last - 1 :] = True
    mask = ~hidden[:, None, None].expand(2, 1, plan.k_blocks.n, plan.k_blocks.n)
    blocks = plan.k_blocks
    plan = replace(BlockPlan.from_mask(mask, blocks, blocks, order=plan.order), hidden=hidden)
    unseen = torch.zeros(2, 1, sum((140, 71, 40)), 1, dtype=torch.bool, device=DEVICE)
    unseen[1, 0, 211:] = True
    unseen = unseen.expand(-1, 3, -1, -1)
    if plan.order is not None:
        unseen = plan.order.undo(unseen)
    shown = (~unseen).float()
    got = quantise(q, k.masked_fill(unseen, torch.nan), v.masked_fill(unseen, torch.inf), plan)
    k_mean, v_mean = ((x * shown).sum(2) / shown.sum(2) for x in (k, v))
    torch.testing.assert_close(got.centres[:, :, 0], k_mean)
    torch.testing.assert_close(got.centres[:, :, 1], v_mean)
    reach = ((v - v_mean[:, :, None]) * shown).abs().amax(2)
    torch.testing.assert_close(got.centres[:, :, 2], reach / 448)


def test_keys_alone():
    q, k, v, plan = problem()
    got, both = (quantise(q, k, v, plan, integers=True, values=x) for x in (False, True))
    assert got.v is None
    assert torch.equal(got.k, both.k)


def test_queries_and_keys_of_other_numbers():
    q, k, v, plan = problem()
    blocks = Blocks.uniform(50, 32).to(DEVICE)
    mask = torch.ones(1, 1, blocks.n, plan.k_blocks.n, dtype=torch.bool, device=DEVICE)
    few = BlockPlan.from_mask(mask, blocks, plan.k_blocks)
    got, all_of_them = quantise(q[:, :, :50], k, v, few), quantise(q, k, v, plan)
    assert got.q.shape[2] == 2
    assert torch.equal(got.q[:, :, 0].float(), all_of_them.q[:, :, 0].float())
    assert torch.equal(got.k.float(), all_of_them.k.float())


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "dim outermost"])
def test_strides(layout: str):
    *tensors, plan = problem()
    laid = [LAYOUTS[layout](x) for x in tensors]
    expected = quantise(*(x.contiguous() for x in laid), plan, integers=True)
    got = quantise(*laid, plan, integers=True)
    assert torch.equal(got.q, expected.q)
    assert torch.equal(got.k, expected.k)
    assert torch.equal(got.v.float(), expected.v.float())


def test_an_empty_head():
    """All keys equal: nothing is left of them, and no step is 0."""
    q, k, v, plan = problem()
    k[:], v[:] = 7.0, 2.0
    got = quantise(q, k, v, plan)
    assert (got.k_step > 0).all()
    assert not (got.k.float() * got.k_step[..., None, None]).abs().amax() > 1e-5
    assert not got.v.isnan().any()


def test_many_keys_have_the_mean_of_some():
    """Long sequences are sampled: the mean key is near, and any key does as well."""
    generator = torch.Generator().manual_seed(0)
    tokens = 16384 + 100
    k = torch.randn(1, 1, tokens, 16, generator=generator).to(DEVICE) + 4
    blocks = Blocks.uniform(tokens, 128).to(DEVICE)
    mask = torch.ones(1, 1, blocks.n, blocks.n, dtype=torch.bool, device=DEVICE)
    plan = replace(BlockPlan.from_mask(mask, blocks, blocks), order=None)
    got = quantise(k, k, k, plan, values=False, integers=True)
    assert (got.centres[0, 0, 0] - k.mean((0, 1, 2))).abs().max() < 0.1


@pytest.mark.parametrize("hides", [False, True])
def test_values_beyond_the_sample(hides: bool):
    """Steps of long sequences are of a sample: nothing is cut off where it lacks the greatest, and
    heads that lack nothing, or only what nobody reads, keep their steps."""
    generator = torch.Generator().manual_seed(0)
    tokens = 16384
    v = torch.randn(1, 2, tokens, 16, generator=generator).to(DEVICE)
    v[..., 3] = 1.0  # constant in the sample
    v[0, 1, 63] = 5000.0  # in a tile that is not in the sample
    v[0, 1, 63, 3] = -9.0
    blocks = Blocks.uniform(tokens, 128).to(DEVICE)
    mask = torch.ones(1, 1, blocks.n, blocks.n, dtype=torch.bool, device=DEVICE)
    hidden = torch.zeros(1, blocks.n, dtype=torch.bool, device=DEVICE)
    hidden[0, 0] = hides
    mask &= ~hidden[:, None, None]
    plan = replace(
        BlockPlan.from_mask(mask, blocks, blocks), hidden=hidden if hides else None, order=None
    )
    got = quantise(v, v, v, plan)
    assert got.excess[0, 0] == 0
    assert bool(got.excess[0, 1] > 448) != hides
    step = got.centres[:, :, None, 2] * got.excess.clamp(min=448)[..., None, None] / 448
    values = columns_of(got.v, blocks) * step + got.centres[:, :, None, 1]
    first = 128 if hides else 0
    near = {"rtol": E4M3["rtol"], "atol": 0.3 if DEVICE == "cpu" else 0.05}
    torch.testing.assert_close(values[..., first:, :3], v[..., first:, :3], **near)
    if not hides:  # the one that was lacking is the coarsest that there is
        torch.testing.assert_close(values[0, 1, 63], v[0, 1, 63], rtol=0.5, atol=0.1)
