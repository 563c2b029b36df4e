"""Pooled entries, tails and selection at real sizes, on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse import methods, selection
from dit_sparse.attention import attend, select_backend
from dit_sparse.frame import frame_of
from dit_sparse.grid import TextSpan, TokenGrid, TokenLayout
from dit_sparse.importance import sampled_importance
from dit_sparse.method import CallContext

pytest.importorskip("dit_sparse.kernels.block_sparse")

LAYOUTS = {
    "image": TokenLayout.of(TokenGrid(1, 48, 48)),
    "video": TokenLayout.of(TokenGrid(5, 21, 40), 77, 130),
    "padding": TokenLayout((TokenGrid(5, 20, 20), TextSpan(300, (300, 17)))),
}
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("pisa", {"density": 0.2}),
    ("pisa", {"density": 0.2, "tail": "zeroth", "block": 64}),
    ("pisa", {"mass": 0.4, "tail": "block", "forced": ("self",)}),
    ("pisa", {"density": 0.2, "prior": "deviation", "order": "tile"}),
    ("psa", {"ends": (0.1, 0.2, 0.3, 0.5)}),
    ("psa", {"ends": (0.1, 0.2, 0.3, 0.5), "block": 64, "skipped": "mean"}),
    ("psa", {"allocation": "mass", "ends": (0.3, 0.5, 0.6, 0.8), "similarity": (0.2, 0.1, 0.0)}),
]


def qkv(layout: TokenLayout, dim: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Keys that are alike nearby, in memory of `[B, N, H, D]`, as models make them."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (2, layout.length, 3, dim)
    q, k, v = (torch.randn(shape, generator=generator, device="cuda") for _ in range(3))
    k = 0.5 * k + torch.randn(2, 1, 3, dim, generator=generator, device="cuda")
    return [x.to(dtype).transpose(1, 2) for x in (q, k, v)]


def relative_error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
class TestOnGpu:
    @pytest.mark.parametrize(("name", "options"), METHODS)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dim", [64, 128])
    def test_methods_against_the_reference(
        self, name: str, options: dict[str, Any], layout: str, dim: int
    ):
        q, k, v = qkv(LAYOUTS[layout], dim)
        plan = methods.create(name, options).plan(q, k, CallContext(LAYOUTS[layout], values=v))
        backend, refusals = select_backend(q, k, v, plan)
        assert (backend.name, refusals) == ("triton", ())
        got = attend(q, k, v, plan, backend=backend)
        exact = attend(*(x.double() for x in (q, k, v)), plan, backend="reference")
        seen = exact.lse > -torch.inf
        assert relative_error(got.out[seen], exact.out[seen]) <= 1e-2
        torch.testing.assert_close(got.lse[seen], exact.lse[seen], rtol=0, atol=5e-3)
        again = attend(q, k, v, plan, backend=backend)
        assert torch.equal(again.out, got.out)

    @pytest.mark.parametrize(
        ("name", "options"), [("pisa", {"density": 1.0}), ("psa", {"ends": (1.0,) * 4})]
    )
    def test_everything_exact_is_dense(self, name: str, options: dict[str, Any]):
        q, k, v = qkv(LAYOUTS["video"], 128)
        plan = methods.create(name, options).plan(q, k, CallContext(LAYOUTS["video"]))
        dense = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
        assert relative_error(attend(q, k, v, plan).out, dense) <= 1e-2

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_summaries_and_importance_are_those_of_the_cpu(self, layout: str):
        q, k, v = qkv(LAYOUTS[layout], 64, torch.float32)
        here = frame_of(LAYOUTS[layout], 128, "hilbert", device=q.device)
        there = frame_of(LAYOUTS[layout], 128, "hilbert")
        close = {"rtol": 1e-3, "atol": 1e-3}
        for of in (
            lambda f, q, k, v: selection.pooled_scores(q, k, f),
            lambda f, q, k, v: selection.covariance_norms(k, v, f, centred=True),
            lambda f, q, k, v: sampled_importance(q, k, f),
            lambda f, q, k, v: sampled_importance(q, k, f, norm="max"),
        ):
            got, expected = of(here, q, k, v), of(there, q.cpu(), k.cpu(), v.cpu())
            torch.testing.assert_close(got.cpu(), expected, **close)

    @pytest.mark.parametrize(("name", "options"), METHODS)
    def test_planning_does_not_wait_for_the_device(self, name: str, options: dict[str, Any]):
        q, k, v = qkv(LAYOUTS["image"], 128)
        method, context = methods.create(name, options), CallContext(LAYOUTS["image"], values=v)
        attend(q, k, v, method.plan(q, k, context))  # compiles, and fills the frame's cache
        torch.cuda.set_sync_debug_mode("error")
        try:
            attend(q, k, v, method.plan(q, k, context))
        finally:
            torch.cuda.set_sync_debug_mode("default")
