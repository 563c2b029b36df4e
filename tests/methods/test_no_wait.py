"""Methods that plan from q and k look at no value on the host, which would wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse import methods
from dit_sparse.grid import TextSpan, TokenGrid, TokenLayout
from dit_sparse.method import CallContext

LAYOUTS = [
    TokenLayout.of(TokenGrid(5, 9, 8)),
    TokenLayout((TokenGrid(3, 7, 11), TextSpan(150, (150, 3)))),
]
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("pisa", {}),
    ("pisa", {"mass": 0.5, "forced": ("self",), "prior": "deviation", "tail": "block"}),
    ("psa", {}),
    ("psa", {"allocation": "mass", "similarity": (0.7, 0.6, 0.5), "skipped": "mean"}),
    ("psa", {"importance": "means", "forced": ("neighbours", "first_frame")}),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("name", "options"), METHODS)
def test_plans_are_made_without_values(layout: TokenLayout, name: str, options: dict[str, Any]):
    q, k, v = (torch.empty(2, 4, layout.length, 16, device="meta") for _ in range(3))
    plan = methods.create(name, options).plan(q, k, CallContext(layout, values=v))
    assert plan.device.type == "meta"
    assert plan.density_tensor.device.type == "meta"
    if plan.tail != "none":
        assert plan.visited.shape == (2, 4, plan.q_blocks.n, plan.k_blocks.n)
