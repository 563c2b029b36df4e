"""Sampled importance in Triton's interpreter, against all weights in float64."""

from __future__ import annotations

import pytest
import torch

importance = pytest.importorskip("dit_sparse.kernels.importance")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter"),
    pytest.mark.usefixtures("poisoned"),
]


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize(("n", "count"), [(1, 32), (5, 32), (9, 16), (3, 4), (70, 1), (3, 64)])
@pytest.mark.parametrize("hidden", [None, 1, 2])
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 16), (torch.float16, 72)])
def test_against_all_weights(
    softmax: bool,
    n: int,
    count: int,
    hidden: int | None,
    dtype: torch.dtype,
    dim: int,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(importance, "processors", lambda device: 1)  # several tiles a program
    generator = torch.Generator().manual_seed(n)
    q, k = (torch.randn(2, 2, n * count, dim, generator=generator).to(dtype) * 3 for _ in range(2))
    unseen = None
    if hidden is not None:
        unseen = torch.rand(hidden, n, generator=generator) < 0.3
    got = importance.sampled_maximum(q, k, count, scale=dim**-0.5, softmax=softmax, hidden=unseen)
    scores = q.double() @ k.double().transpose(-2, -1) * dim**-0.5
    if unseen is not None:
        scores = scores.masked_fill(unseen.repeat_interleave(count, 1)[:, None, None], -torch.inf)
    top = scores.amax(-1, keepdim=True)
    base = scores.logsumexp(-1, keepdim=True) if softmax else top
    weight = (scores - base.masked_fill(top == -torch.inf, 0.0)).exp()
    expected = weight.view(2, 2, n, count, n, count).amax((3, 5))
    torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=1e-6)


def test_without_descriptors(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importance, "TensorDescriptor", None)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 5 * 16, 40, generator=generator) for _ in range(2))
    got = importance.sampled_maximum(q, k, 16, scale=0.2, softmax=True)
    weight = (q.double() @ k.double().transpose(-2, -1) * 0.2).softmax(-1)
    expected = weight.view(1, 2, 5, 16, 5, 16).amax((3, 5))
    torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=1e-6)


def test_rows_are_taken_at_positions_of_their_own():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 90, 3, 40, generator=generator).transpose(1, 2)
    k = torch.randn(2, 3, 90, 40, generator=generator)
    tokens = torch.randint(90, (2, 3, 70), generator=generator)
    taken = importance.take(q, k, tokens)
    for got, x, index in zip(taken, (q, k), tokens, strict=True):
        assert torch.equal(got, x.gather(2, index[None, :, :, None].expand(2, -1, -1, 40)))
