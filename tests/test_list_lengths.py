"""Which plans say that their rows differ much in length, and which that they are for many calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dit_sparse import methods
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.list_lengths import much_longer, uneven
from dit_sparse.method import CallContext
from dit_sparse.plan import BlockPlan, Blocks
from dit_sparse.plan_io import load_plan, save_plan
from tests.paro_cases import GRID, blocks_of, calibration, context, method, random_masks

VIDEO = TokenLayout.of(TokenGrid(4, 24, 32), text_first=40)
PICTURE = TokenLayout.of(TokenGrid(1, 32, 32))


def test_much_longer_is_half_again() -> None:
    assert not uneven(torch.tensor([[15, 5, 10, 10]]))
    assert uneven(torch.tensor([[16, 4, 10, 10]], dtype=torch.int32))
    assert not uneven(torch.zeros(1, 1, 3, dtype=torch.int32))
    assert not uneven(torch.zeros(0))
    assert (much_longer(3.0, 2.0), much_longer(3.1, 2.0)) == (False, True)


@pytest.mark.parametrize(
    ("name", "options", "layout", "expected"),
    [
        ("window", {"density": 0.3}, VIDEO, False),
        ("window", {"window": (3, 9, 9), "stride": 1}, VIDEO, False),
        ("window", {"window": ((3, 9, 9), (3, 9, 9))}, VIDEO, False),
        ("window", {"window": ((1, 9, 9),) * 3 + ((4, 24, 32),)}, VIDEO, True),
        ("window", {"window": (4, 24, 32), "causal": True, "tile": (1, 8, 16)}, VIDEO, True),
        ("sta", {"window": (3, 3, 3), "tile": (2, 8, 8)}, VIDEO, False),
        ("sta", {"window": ((1, 1, 1), (1, 1, 3), (9, 9, 9)), "tile": (2, 8, 8)}, VIDEO, True),
        ("pisa", {"density": 0.3}, PICTURE, False),
        ("pisa", {"mass": 0.5}, PICTURE, True),
        ("pisa", {"mass": 0.5, "forced": ("self",)}, PICTURE, True),
        ("psa", {}, PICTURE, False),
        ("psa", {"allocation": "mass", "ends": (0.3, 0.5, 0.7, 0.9)}, PICTURE, True),
        ("psa", {"similarity": (0.7, 0.6, 0.5)}, PICTURE, True),
        ("psa", {"causal": True, "order": "raster"}, PICTURE, True),
    ],
)
def test_methods(name: str, options: dict[str, Any], layout: TokenLayout, expected: bool) -> None:
    heads = len(options["window"]) if isinstance(options.get("window", 0), tuple) else 2
    q, k = torch.randn(2, 1, heads, layout.length, 8, generator=torch.Generator().manual_seed(0))
    plan = methods.create(name, options).plan(q, k, CallContext(layout))
    assert plan.uneven == expected
    assert plan.to("cpu").uneven == expected
    assert plan.lasting == plan.to("cpu").lasting == (name in ("window", "sta"))


def test_masks_of_a_calibration(tmp_path: Path) -> None:
    """Whatever its budget, rows differ."""
    found = calibration({0: random_masks(1, (0.2, 0.5), blocks_of())}, [("FHW", "WHF")])
    q = torch.empty(1, 2, GRID.length, 8)
    plan = method(found, tmp_path).plan(q, q, context(found, TokenLayout.of(GRID)))
    assert plan.uneven
    assert plan.lasting


@pytest.mark.parametrize("long", [False, True])
def test_block_masks_and_files(tmp_path: Path, long: bool) -> None:
    visited = torch.eye(8, dtype=torch.bool)[None, None].clone()
    visited[..., -1, :] = long
    visited[..., -1, -1] = True
    blocks = Blocks.uniform(8 * 16, 16)
    plan = BlockPlan.from_mask(visited, blocks, blocks)
    assert plan.uneven == long
    loaded = load_plan(save_plan(plan, tmp_path / "plan.safetensors"))
    assert loaded.uneven == long
    assert plan.lasting
    assert loaded.lasting
