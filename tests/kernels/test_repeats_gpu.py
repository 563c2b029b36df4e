"""A hundred calls of every kernel on large inputs: equal bit for bit, planning included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse import methods
from dit_sparse.attention import attend
from dit_sparse.backend import AttentionOutput
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.kernels import tiles
from dit_sparse.kernels.block_sparse import TritonBackend
from dit_sparse.method import CallContext
from tests.noted_launches import noted

LAYOUT = TokenLayout.of(TokenGrid(9, 36, 40), 100, 77)
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
PYRAMID = {"ends": (0.05, 0.1, 0.15, 0.25)}
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("pisa", {"density": 0.2, "tail": "zeroth"}),
    ("pisa", {"density": 0.2, "tail": "first"}),
    ("pisa", {"density": 0.2, "tail": "zeroth", "block": 64}),
    ("psa", PYRAMID),
    ("psa", PYRAMID | {"skipped": "mean"}),
    ("disk", {"radius": 6.5}),
]
WINDOWS: list[tuple[str, dict[str, Any]]] = [
    ("window", {"density": 0.3}),
    ("window", {"window": (5, 15, 17), "stride": (1, 1, 1)}),
]

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]


def check(dim: int, call: Callable[[Tensor, Tensor, Tensor], AttentionOutput]) -> None:
    shape = (1, LAYOUT.length, 12, dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    first = call(q, k, v)
    assert bool(first.out.isfinite().all())
    for _ in range(100):
        again = call(q, k, v)
        assert torch.equal(again.out, first.out)
        assert torch.equal(again.lse, first.lse)


@pytest.mark.parametrize(("name", "options"), METHODS)
@pytest.mark.parametrize("dim", [64, 128])
def test_methods(name: str, options: dict[str, Any], dim: int):
    method = methods.create(name, options)

    def call(q: Tensor, k: Tensor, v: Tensor) -> AttentionOutput:
        plan = method.plan(q, k, CallContext(LAYOUT, step=0, steps=1, values=v))
        return attend(q, k, v, plan, backend="triton")

    check(dim, call)


@pytest.mark.parametrize(("name", "options"), WINDOWS)
@pytest.mark.parametrize("tma", [False, True])
def test_the_portable_kernel(name: str, options: dict[str, Any], tma: bool):
    if tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need compute capability 9.0")
    method = methods.create(name, options)
    backend = TritonBackend(tile=tiles.Tile(64, warps=8, stages=2, tma=tma))

    def call(q: Tensor, k: Tensor, v: Tensor) -> AttentionOutput:
        return attend(q, k, v, method.plan(q, k, CallContext(LAYOUT)), backend=backend)

    check(128, call)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(("name", "options"), WINDOWS)
@pytest.mark.parametrize("kernel", ["hopper", "hopper_gluon"])
@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_the_hopper_kernels(monkeypatch, name, options, kernel: Any, bound: bool, dim: int):
    method, backend = methods.create(name, options), TritonBackend(kernel=kernel, bound=bound)
    runs = noted(monkeypatch)

    def call(q: Tensor, k: Tensor, v: Tensor) -> AttentionOutput:
        return attend(q, k, v, method.plan(q, k, CallContext(LAYOUT)), backend=backend)

    check(dim, call)
    assert runs[0][0] == kernel.removeprefix("hopper_")


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(("name", "options"), WINDOWS)
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_eight_bits(name: str, options: dict[str, Any], precision: Any):
    method = methods.create(name, options)

    def call(q: Tensor, k: Tensor, v: Tensor) -> AttentionOutput:
        return attend(q, k, v, method.plan(q, k, CallContext(LAYOUT)), precision=precision)

    check(128, call)
