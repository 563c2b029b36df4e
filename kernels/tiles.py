"""Which tile a portable launch uses, see `variants`: never tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass

from dit_sparse.kernels.variants import tile_row


@dataclass(frozen=True)
class Tile:
    """Compile-time choices of one launch.

    Args:
        keys: key rows of one tile; divides the plan's key block.
        warps: warps of a program.
        stages: depth of the load pipeline.
        tma: load keys and values through tensor descriptors (Hopper and later).
        queries: the most query rows of a program; blocks of more are cut into equal parts.
    """

    keys: int
    warps: int
    stages: int
    tma: bool
    queries: int = 128


def choose_tile(
    capability: tuple[int, int],
    head_dim: int,
    itemsize: int,
    q_block: int,
    k_block: int,
    *,
    boxed: bool,
) -> Tile:
    """The tile for a GPU and a problem.

    Args:
        capability: CUDA compute capability; (0, 0) for the interpreter.
        head_dim: the larger of the query and value head dims, padded to a power of two.
        itemsize: bytes of one element.
        q_block, k_block: block sizes of the plan.
        boxed: whether entries are masked or have biases, which takes registers.
    """
    row = tile_row(capability, itemsize, head_dim, boxed)
    # All rows in four warps spill registers where masks, or loads without descriptors, take some.
    warps = row.warps if q_block >= row.queries else 4
    return Tile(min(row.keys, k_block), warps, row.stages, row.tma, min(row.queries, q_block))


def shared_memory(tile: Tile, head_dim: int, itemsize: int, q_block: int) -> int:
    """Bytes of shared memory that a program of the portable kernel takes at most.

    Queries, the tiles of keys and values that are in flight, and in 32 bits, whose products read
    shared memory, the weights or, behind descriptors, a transposed tile. What Triton 3.6 and 3.9
    take beyond that for Ampere and Hopper is below 2 KiB.

    Args:
        tile: from `choose_tile`.
        head_dim, itemsize, q_block: as there.
    """
    keys, queries = tile.keys * head_dim * itemsize, min(tile.queries, q_block)
    weights = queries * tile.keys * itemsize
    if itemsize == 2:
        held = 2 * tile.stages * keys
    else:
        held = 2 * keys + (max(keys, weights) if tile.tma else weights)
    return queries * head_dim * itemsize + held + 2048
