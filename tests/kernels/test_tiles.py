"""The tile table, apart from the kernel."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from dit_sparse.kernels.tiles import Tile, choose_tile, shared_memory

BLOCKS = (16, 32, 64, 128)
PROBLEMS = list(
    itertools.product(
        ["cpu", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942"],
        [16, 32, 64, 128, 256],  # head dim, padded
        [2, 4],  # bytes of an element
        BLOCKS,  # queries
        (*BLOCKS, 256),  # keys
        [False, True],  # box
    )
)


def tile_of(*problem: Any, boxed: bool) -> Tile:
    tile = choose_tile(*problem, boxed=boxed)
    assert tile is not None
    return tile


def power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("architecture", sorted({p[0] for p in PROBLEMS}))
def test_tiles_cut_key_blocks_into_equal_parts(architecture: str):
    for problem in (p for p in PROBLEMS if p[0] == architecture):
        *_, k_block, boxed = problem
        tile = tile_of(*problem[:5], boxed=boxed)
        assert k_block % tile.keys == 0, problem
        assert 16 <= tile.keys <= 128, problem
        assert power_of_two(tile.keys), problem
        assert tile.warps in (4, 8), problem
        assert tile.stages >= 1, problem
        assert problem[3] % tile.queries == 0, problem


@pytest.mark.parametrize(
    ("architecture", "tma"),
    [
        ("sm_80", False),
        ("sm_89", False),
        ("sm_90", True),
        ("sm_100", True),
        ("sm_120", False),
        ("gfx90a", False),
        ("gfx1100", False),
    ],
)
def test_tensor_descriptors_are_for_gpus_that_multiply_from_shared_memory(
    architecture: str, tma: bool
):
    assert tile_of(architecture, 128, 2, 128, 128, boxed=False).tma == tma


def test_the_load_pipeline_fits_into_shared_memory():
    """163 KiB on an A100 and 99 KiB on consumer GPUs; half precision, all stages of k and v."""
    room = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_120": 99}
    for architecture, head_dim, itemsize, q_block, k_block, boxed in PROBLEMS:
        if itemsize == 2 and architecture in room:
            tile = tile_of(architecture, head_dim, itemsize, q_block, k_block, boxed=boxed)
            used = 2 * tile.stages * tile.keys * head_dim * itemsize
            assert used <= room[architecture] * 1024


def test_tiles_shrink_as_rows_grow():
    """Bytes of a tile decide how many stages fit."""
    for architecture, q_block, boxed in itertools.product(
        ["sm_80", "sm_90"], BLOCKS, [False, True]
    ):
        keys = [
            tile_of(architecture, dim, 2, q_block, 128, boxed=boxed).keys for dim in (64, 128, 256)
        ]
        assert keys == sorted(keys, reverse=True)
        assert keys[0] >= tile_of(architecture, 64, 4, q_block, 128, boxed=boxed).keys


def test_amd_tiles_fit_into_64_kib():
    """Of shared memory, in every MI200 and MI300 and in every Radeon."""
    for architecture, (head_dim, itemsize), q_block, k_block, boxed in itertools.product(
        ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"],
        [(64, 2), (128, 2), (256, 2), (64, 4), (128, 4), (256, 4)],
        BLOCKS,
        BLOCKS,
        [False, True],
    ):
        tile = choose_tile(architecture, head_dim, itemsize, q_block, k_block, boxed=boxed)
        on_radeon = architecture.startswith("gfx1")
        assert (tile is None) == (on_radeon and head_dim * itemsize > 256), architecture
        if tile is not None:
            assert shared_memory(tile, head_dim, itemsize, q_block, amd=True) <= 65_536
