"""Row gather in Triton against indexing in PyTorch."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.grid import Permutation
from tests.block_cases import LAYOUTS

rows = pytest.importorskip("dit_sparse.kernels.permute")
norms = pytest.importorskip("dit_sparse.kernels.norms")
permute = rows.permute
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, Triton's interpreter runs


def order_of(tokens: int, heads: int | None) -> Permutation:
    generator = torch.Generator().manual_seed(tokens)
    rows = [torch.randperm(tokens, generator=generator) for _ in range(heads or 1)]
    return Permutation(torch.stack(rows) if heads else rows[0]).to(DEVICE)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 16, 72, 128])
@pytest.mark.parametrize("per_head", [False, True])
def test_equals_indexing(dtype: torch.dtype, dim: int, per_head: bool):
    x = torch.randn(2, 3, 300, dim).to(DEVICE, dtype)
    order = order_of(300, 3 if per_head else None)
    (got,) = permute([x], order)
    assert torch.equal(got, order(x))
    assert got.is_contiguous()


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "dim outermost"])
@pytest.mark.parametrize("per_head", [False, True])
def test_strides(layout: str, per_head: bool):
    x = LAYOUTS[layout](torch.randn(2, 3, 130, 40, device=DEVICE))
    order = order_of(130, 3 if per_head else None)
    assert torch.equal(permute([x], order)[0], order(x))


@pytest.mark.parametrize("tokens", [1, 255, 256, 257])
def test_lengths(tokens: int):
    x = torch.randn(1, 2, tokens, 32, device=DEVICE)
    order = order_of(tokens, None)
    assert torch.equal(permute([x], order)[0], order(x))


@pytest.mark.gpu
def test_more_elements_than_int32_counts():
    tokens, heads, dim = 2**17, 130, 128
    x = torch.randn(heads * tokens * dim, dtype=torch.bfloat16, device="cuda")
    order = order_of(tokens, None)
    for view in (x.view(1, heads, tokens, dim), x.view(1, tokens, heads, dim).transpose(1, 2)):
        (got,) = permute([view], order)
        rows = torch.tensor([0, 1, tokens - 1], device="cuda")
        assert torch.equal(got[:, :, rows], view[:, :, order.index[rows]])


@pytest.mark.parametrize("dims", [(40, 40), (40, 40, 40), (40, 40, 24)])
def test_several_tensors(dims: tuple[int, ...]):
    order = order_of(130, None)
    views = list(LAYOUTS.values())
    tensors = [torch.randn(2, 3, 130, dim, device=DEVICE) for dim in dims]
    tensors = [view(x) for view, x in zip(views, tensors, strict=False) if x.stride(-1) == 1]
    for got, x in zip(permute(tensors, order), tensors, strict=True):
        assert torch.equal(got, order(x))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("way", ["in order", "on the way"])
def test_lengths_of_queries_and_of_the_longest_key(dtype: torch.dtype, per_head: bool, way: str):
    q, k, v = (torch.randn(2, 3, 300, 72).to(DEVICE, dtype) for _ in range(3))
    order = order_of(300, 3 if per_head else None)
    queries, longest = norms.empty(q)
    if way == "in order":
        norms.measure(order(q), order(k), (queries, longest))
    else:
        out = rows.empty((q, k, v))
        rows.gather((q, k, v), order, out, (queries, longest))
        for got, given in zip(out.unbind(), (q, k, v), strict=True):
            assert torch.equal(got, order(given))
    torch.testing.assert_close(queries, order(q).float().norm(dim=-1))
    torch.testing.assert_close(longest, k.float().norm(dim=-1).amax(-1))
