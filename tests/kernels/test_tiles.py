"""The tile table, apart from the kernel."""

from __future__ import annotations

import itertools

import pytest

from dit_sparse.kernels.tiles import choose_tile

BLOCKS = (16, 32, 64, 128)
PROBLEMS = list(
    itertools.product(
        [(0, 0), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)],  # capability
        [16, 32, 64, 128, 256],  # head dim, padded
        [2, 4],  # bytes of an element
        BLOCKS,  # queries
        (*BLOCKS, 256),  # keys
        [False, True],  # box
    )
)


def power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("capability", sorted({p[0] for p in PROBLEMS}))
def test_tiles_cut_key_blocks_into_equal_parts(capability: tuple[int, int]):
    for problem in (p for p in PROBLEMS if p[0] == capability):
        *_, k_block, boxed = problem
        tile = choose_tile(*problem[:5], boxed=boxed)
        assert k_block % tile.keys == 0, problem
        assert 16 <= tile.keys <= 128, problem
        assert power_of_two(tile.keys), problem
        assert tile.warps in (4, 8), problem
        assert tile.stages >= 1, problem
        assert problem[3] % tile.queries == 0, problem


@pytest.mark.parametrize(
    ("capability", "tma"),
    [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)],
)
def test_tensor_descriptors_are_for_gpus_that_multiply_from_shared_memory(
    capability: tuple[int, int], tma: bool
):
    assert choose_tile(capability, 128, 2, 128, 128, boxed=False).tma == tma


def test_the_load_pipeline_fits_into_shared_memory():
    """163 KiB on an A100 and 99 KiB on consumer GPUs; half precision, all stages of k and v."""
    room = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (12, 0): 99}
    for capability, head_dim, itemsize, q_block, k_block, boxed in PROBLEMS:
        if itemsize == 2 and capability in room:
            tile = choose_tile(capability, head_dim, itemsize, q_block, k_block, boxed=boxed)
            used = 2 * tile.stages * tile.keys * head_dim * itemsize
            assert used <= room[capability] * 1024


def test_tiles_shrink_as_rows_grow():
    """Bytes of a tile decide how many stages fit."""
    for capability, q_block, boxed in itertools.product([(8, 0), (9, 0)], BLOCKS, [False, True]):
        keys = [
            choose_tile(capability, dim, 2, q_block, 128, boxed=boxed).keys
            for dim in (64, 128, 256)
        ]
        assert keys == sorted(keys, reverse=True)
        assert keys[0] >= choose_tile(capability, 64, 4, q_block, 128, boxed=boxed).keys
