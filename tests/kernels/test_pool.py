"""Summaries of blocks from the Triton kernels, in the interpreter, against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_sparse import correction
from dit_sparse.grid import Permutation
from dit_sparse.plan import Blocks

pool = pytest.importorskip("dit_sparse.kernels.pool")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")

BLOCKS = {
    "whole": Blocks.uniform(128, 32),
    "ragged end": Blocks.uniform(70, 32),
    "one token": Blocks.uniform(1, 16),
    "short anywhere": Blocks.of_runs([5, 64, 1, 33], 64),
    "many": Blocks.uniform(16 * 19 + 3, 16),
}
blocks_of_all_kinds = pytest.mark.parametrize("kind", BLOCKS)


def tokens(blocks: Blocks, dim: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[B, H, N, D]` in memory of `[B, N, H, D]`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, blocks.total, 3, dim, generator=generator)
    return x.to(dtype).transpose(1, 2)


def order_of(kind: str, blocks: Blocks) -> Permutation | None:
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(blocks.total, generator=generator) for _ in range(3)]
    return Permutation(rows[0] if kind == "shared" else torch.stack(rows))


def grouped(x: Tensor, blocks: Blocks, factor: int) -> Tensor:
    """Means of groups of tokens, one by one; zeros for groups without tokens."""
    groups = -(-blocks.size // factor)
    out = x.new_zeros(*x.shape[:2], blocks.n * groups, x.shape[-1])
    starts = blocks.starts.tolist()
    for j in range(blocks.n):
        for r, first in enumerate(range(starts[j], starts[j + 1], factor)):
            last = min(first + factor, starts[j + 1])
            out[:, :, j * groups + r] = x[:, :, first:last].mean(2)
    return out


@blocks_of_all_kinds
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("factors", [(), (4,), (2, 4, 8, 16, 32, 64, 128)])
@pytest.mark.parametrize(("order", "dim"), [("none", 72), ("shared", 16), ("head", 40)])
def test_means(kind: str, factors: tuple[int, ...], order: str, dim: int):
    blocks = BLOCKS[kind]
    x, permutation = tokens(blocks, dim), order_of(order, blocks)
    got = pool.pool(x, blocks, factors=factors, order=permutation)
    ordered = (x if permutation is None else permutation(x)).double()
    expected = [grouped(ordered, blocks, factor) for factor in factors]
    rows = torch.cat([*expected, ordered[:, :, :0]], dim=2)
    torch.testing.assert_close(got.pooled.double(), rows, rtol=1e-6, atol=1e-6)
    means = correction.block_means(ordered, blocks)
    assert got.blocks.dtype == torch.float32
    torch.testing.assert_close(got.blocks.double(), means, rtol=1e-6, atol=1e-6)


@blocks_of_all_kinds
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("factors", [(2, 4, 8), (4, 128)])
def test_groups_stand_in_several_rows(kind: str, factors: tuple[int, ...]):
    """Rows without tokens are those of the block's last group that has some."""
    blocks, least = BLOCKS[kind], 32
    x = tokens(blocks, 16)
    got = pool.pool_all([x], blocks, factors=factors, least=least)[0].pooled
    expected = []
    for factor in factors:
        groups = -(-blocks.size // factor)
        means = grouped(x.double(), blocks, factor).unflatten(2, (blocks.n, groups))
        last = (blocks.lengths - 1) // factor
        at = torch.minimum(torch.arange(groups), last[:, None])
        means = means[:, :, torch.arange(blocks.n)[:, None], at]
        expected.append(means.repeat_interleave(max(1, least // groups), 3).flatten(2, 3))
    torch.testing.assert_close(got.double(), torch.cat(expected, 2), rtol=1e-6, atol=1e-6)


def test_sums_are_in_fp32():
    blocks = Blocks.uniform(256, 256)
    x = tokens(blocks, 16, dtype=torch.float16) + 100
    got = pool.pool(x, blocks).blocks
    torch.testing.assert_close(got.double(), x.double().mean(2, keepdim=True), rtol=1e-6, atol=0)


@blocks_of_all_kinds
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 16), (72, 40), (32, 96)])
def test_covariances(kind: str, dim: int, value_dim: int):
    blocks = BLOCKS[kind]
    k, v = tokens(blocks, dim), tokens(blocks, value_dim, seed=1)
    k = k + 5  # an offset that all keys share must not cost digits
    means = pool.pool(k, blocks).blocks
    exact = k.double(), v.double(), blocks
    close = {"rtol": 1e-4, "atol": 1e-4}
    total = pool.covariance_sum(k, v, blocks, means)
    torch.testing.assert_close(total.double(), correction.covariance_sum(*exact), **close)
    each = pool.covariances(k, v, blocks, means)
    per_token = correction.covariances(*exact) / blocks.lengths.double()[:, None, None]
    torch.testing.assert_close(each.double(), per_token, **close)


@pytest.mark.parametrize("batches", [1, 2])
def test_a_covariance_sum_leaves_hidden_blocks_out(batches: int):
    blocks = BLOCKS["many"]
    k, v = tokens(blocks, 16), tokens(blocks, 16, seed=1)
    hidden = torch.rand(batches, blocks.n) < 0.3
    unseen = hidden[:, blocks.of_token][:, None, :, None]
    k, v = (x.masked_fill(unseen, float("nan")) for x in (k, v))
    got = pool.covariance_sum(k, v, blocks, pool.pool(k, blocks).blocks, hidden)
    for b in range(2):
        seen = ~hidden[b % batches]
        expected = correction.covariance_sum(k[b].double(), v[b].double(), blocks, seen)
        assert bool(expected.isfinite().all())
        torch.testing.assert_close(got[b].double(), expected, rtol=1e-5, atol=1e-4)


@blocks_of_all_kinds
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("order", ["none", "head"])
def test_covariance_norms(kind: str, centred: bool, order: str):
    blocks = BLOCKS[kind]
    k, v = tokens(blocks, 24), tokens(blocks, 96, seed=1)
    permutation = order_of(order, blocks)
    means = pool.pool(k, blocks, order=permutation).blocks
    got = pool.covariance_norms(k, v, blocks, means, centred=centred, order=permutation)
    ordered = [(x if permutation is None else permutation(x)).double() for x in (k, v)]
    expected = correction.covariance_norms(*ordered, blocks, centred=centred)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
