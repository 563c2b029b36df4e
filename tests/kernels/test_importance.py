"""Sampled importance against all weights in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from torch import Tensor

importance = pytest.importorskip("dit_sparse.kernels.importance")
pytestmark = pytest.mark.usefixtures("poisoned")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
Hidden = Literal["none", "any", "each", "last"]
SIZES = [(1, 32), (5, 32), (9, 16), (3, 4), (70, 1), (3, 64)]


def hidden_blocks(kind: Hidden, batch: int, n: int, seed: int) -> Tensor | None:
    """Key blocks that are not there: some anywhere, the same for all entries of the batch or not,
    or the last ones of each, as padding is."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "none":
        return None
    if kind == "last":
        first = torch.tensor([n - n // 3, n])[:batch]
        return torch.arange(n) >= first[:, None]
    return torch.rand(1 if kind == "any" else batch, n, generator=generator) < 0.3


def maximum_weights(
    q: Tensor, k: Tensor, count: int, scale: float, softmax: bool, unseen: Tensor | None
) -> Tensor:
    batch, heads, total, _ = q.shape
    n = total // count
    scores = q.double() @ k.double().transpose(-2, -1) * scale
    if unseen is not None:
        scores = scores.masked_fill(unseen.repeat_interleave(count, 1)[:, None, None], -torch.inf)
    top = scores.amax(-1, keepdim=True)
    base = scores.logsumexp(-1, keepdim=True) if softmax else top
    weight = (scores - base.masked_fill(top == -torch.inf, 0.0)).exp()
    return weight.view(batch, heads, n, count, n, count).amax((3, 5))


@interpreted
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize(("n", "count"), SIZES)
@pytest.mark.parametrize("hidden", ["none", "any", "each", "last"])
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 16), (torch.float16, 72)])
def test_against_all_weights(
    softmax: bool,
    n: int,
    count: int,
    hidden: Hidden,
    dtype: torch.dtype,
    dim: int,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(importance, "processors", lambda device: 1)  # several tiles a program
    generator = torch.Generator().manual_seed(n)
    q, k = (torch.randn(2, 2, n * count, dim, generator=generator).to(dtype) * 3 for _ in range(2))
    unseen, scale = hidden_blocks(hidden, 2, n, n), dim**-0.5
    got = importance.sampled_maximum(q, k, count, scale=scale, softmax=softmax, hidden=unseen)
    expected = maximum_weights(q, k, count, scale, softmax, unseen)
    torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize(
    ("n", "count"), [(9, 16), (3, 64), (71, 32), (93, 16), (64, 32), (2051, 1)]
)
@pytest.mark.parametrize("hidden", ["none", "any", "last"])
@pytest.mark.parametrize(
    ("dtype", "dim"), [(torch.bfloat16, 128), (torch.float16, 72), (torch.bfloat16, 64)]
)
def test_on_a_gpu(softmax: bool, n: int, count: int, hidden: Hidden, dtype: torch.dtype, dim: int):
    generator = torch.Generator("cuda").manual_seed(n)
    shape = (2, 2, n * count, dim)
    q, k = (torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(2))
    unseen, scale = hidden_blocks(hidden, 2, n, n), dim**-0.5
    unseen = None if unseen is None else unseen.cuda()
    got = importance.sampled_maximum(q, k, count, scale=scale, softmax=softmax, hidden=unseen)
    expected = maximum_weights(q, k, count, scale, softmax, unseen)
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-6)


@interpreted
@pytest.mark.parametrize("hidden", ["none", "each", "last"])
@pytest.mark.parametrize("n", [4, 5])
def test_without_descriptors(monkeypatch: pytest.MonkeyPatch, hidden: Hidden, n: int):
    monkeypatch.setattr(importance, "TensorDescriptor", None)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 2, n * 16, 40, generator=generator) for _ in range(2))
    unseen = hidden_blocks(hidden, 2, n, 0)
    got = importance.sampled_maximum(q, k, 16, scale=0.2, softmax=True, hidden=unseen)
    expected = maximum_weights(q, k, 16, 0.2, True, unseen)
    torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=1e-6)


@interpreted
@pytest.mark.parametrize("blocks", [(3,), (1023,), (1024, 1025), (1050,), (63, 64), (0, 1099), ()])
def test_blocks_that_are_not_there_among_many(blocks: tuple[int, ...]):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1100, 16, generator=generator) for _ in range(2))
    unseen = torch.zeros(1, 1100, dtype=torch.bool)
    unseen[0, list(blocks)] = True
    got = importance.sampled_maximum(q, k, 1, scale=0.25, softmax=True, hidden=unseen)
    expected = maximum_weights(q, k, 1, 0.25, True, unseen)
    torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "dim", "count", "dtype", "bounded"),
    [
        ("sm_90", 128, 32, torch.bfloat16, True),
        ("sm_90", 64, 8, torch.float16, True),
        ("sm_90", 256, 32, torch.bfloat16, False),
        ("sm_90", 128, 4, torch.bfloat16, False),
        ("sm_90", 64, 32, torch.float32, False),
        ("sm_80", 128, 32, torch.bfloat16, False),
        ("sm_120", 128, 32, torch.bfloat16, False),
        ("gfx942", 128, 32, torch.bfloat16, False),
    ],
)
def test_registers_are_bounded_where_that_makes_room(
    monkeypatch: pytest.MonkeyPatch, name, dim: int, count: int, dtype, bounded: bool
):
    monkeypatch.setattr(importance, "architecture", lambda device: name)
    shape, size = (1, 2, 64, dim), torch.finfo(dtype).bits // 8
    x = SimpleNamespace(is_cuda=True, device="cuda", shape=shape, element_size=lambda: size)
    assert bool(importance._bounded(x, count)) is bounded


@interpreted
def test_rows_are_taken_at_positions_of_their_own():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 90, 3, 40, generator=generator).transpose(1, 2)
    k = torch.randn(2, 3, 90, 40, generator=generator)
    tokens = torch.randint(90, (2, 3, 70), generator=generator)
    taken = importance.take(q, k, tokens)
    for got, x, index in zip(taken, (q, k), tokens, strict=True):
        assert torch.equal(got, x.gather(2, index[None, :, :, None].expand(2, -1, -1, 40)))
