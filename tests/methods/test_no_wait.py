"""Methods that plan from q and k look at no value on the host, which would wait for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dit_sparse import methods
from dit_sparse.grid import TextSpan, TokenGrid, TokenLayout
from dit_sparse.method import CallContext
from tests.paro_cases import GRID, blocks_of, calibration, context, method, random_masks

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


def test_static_masks_are_put_into_place_without_values(tmp_path: Path):
    masks = {0: random_masks(1, (0.2, 0.5), blocks_of())}
    for names in (("FHW", "WHF"), ("HWF", "HWF"), ("FHW", "FHW")):
        found = calibration(masks, [names])
        q = torch.empty(1, 2, GRID.length + 30, 8, device="meta")
        plan = method(found, tmp_path).plan(q, q, context(found, TokenLayout.of(GRID, 10, 20)))
        assert plan.device.type == "meta"
        assert (plan.order is None) == (names == ("FHW", "FHW"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("name", "options"), METHODS)
def test_plans_are_made_without_values(layout: TokenLayout, name: str, options: dict[str, Any]):
    q, k, v = (torch.empty(2, 4, layout.length, 16, device="meta") for _ in range(3))
    plan = methods.create(name, options).plan(q, k, CallContext(layout, values=v))
    assert plan.device.type == "meta"
    assert plan.density_tensor.device.type == "meta"
    if plan.tail != "none":
        assert plan.visited.shape == (2, 4, plan.q_blocks.n, plan.k_blocks.n)
