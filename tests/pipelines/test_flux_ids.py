"""Grids from Flux position ids, whatever their dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.grid import TokenGrid
from dit_sparse.pipelines.family import families
from dit_sparse.pipelines.flux import grids_of


def ids_of(
    rows: int, columns: int, image: int = 0, origin: tuple[int, int] = (0, 0), dtype: Any = None
) -> Tensor:
    grid = torch.zeros(rows, columns, 3)
    grid[..., 0] = image
    grid[..., 1] += torch.arange(rows)[:, None] + origin[0]
    grid[..., 2] += torch.arange(columns)[None] + origin[1]
    return grid.reshape(-1, 3).to(dtype or torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 12), (1, 5), (5, 1), (1, 1), (300, 3), (3, 300), (290, 310)])
def test_flux_grid_survives_rounded_ids(shape: tuple[int, int], dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and shape == (290, 310):
        assert ids_of(*shape, dtype=dtype)[:, 1].unique().numel() < 290  # ids do collide
    assert grids_of(ids_of(*shape, dtype=dtype)) == (TokenGrid(1, *shape),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flux_grids_of_several_images(dtype: torch.dtype) -> None:
    ids = torch.cat(
        [
            ids_of(4, 6, dtype=dtype),
            ids_of(4, 6, image=1, dtype=dtype),
            ids_of(3, 5, image=1, dtype=dtype),  # told from the one before by its row ids
            ids_of(3, 4, image=2, origin=(300, 300), dtype=dtype),
        ]
    )
    shapes = [(4, 6), (4, 6), (3, 5), (3, 4)]
    assert grids_of(ids) == tuple(TokenGrid(1, *s) for s in shapes)
    assert grids_of(ids[None]) == grids_of(ids)


def test_flux_ids_that_are_no_grid_are_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"rows of one length, got rows of \[5, 6\] tokens"):
        grids_of(ids_of(4, 6)[:-1])
    with pytest.raises(ValueError, match="ids of one image are not a grid"):
        grids_of(ids_of(2, 2, origin=(300, 300), dtype=torch.bfloat16))  # four equal ids
    sheared = ids_of(4, 6)
    sheared[6:12, 2] += 1
    with pytest.raises(ValueError, match="ids of one image are not a grid"):
        grids_of(sheared)
    arguments = {
        "hidden_states": torch.zeros(1, 23, 4),
        "img_ids": ids_of(4, 6),
        "encoder_hidden_states": torch.zeros(1, 7, 32),
    }
    with pytest.raises(ValueError, match="img_ids of 23 image tokens, got 24"):
        families()["flux"].layout(tiny("flux").transformer, arguments)
