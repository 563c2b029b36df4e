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
    architecture: str,
    head_dim: int,
    itemsize: int,
    q_block: int,
    k_block: int,
    *,
    boxed: bool,
) -> Tile | None:
    """The tile for a GPU and a problem; `None` where none is any good, see `variants.tile_row`.

    Args:
        architecture: see `architecture.architecture`; `"cpu"` for the interpreter.
        head_dim: the larger of the query and value head dims, padded to a power of two.
        itemsize: bytes of one element.
        q_block, k_block: block sizes of the plan.
        boxed: whether entries are masked or have biases, which takes registers.
    """
    row = tile_row(architecture, itemsize, head_dim, boxed)
    if row is None:
        return None
    # All rows in four warps spill registers where masks, or loads without descriptors, take some.
    warps = row.warps if q_block >= row.queries else 4
    return Tile(min(row.keys, k_block), warps, row.stages, row.tma, min(row.queries, q_block))


def shared_memory(
    tile: Tile, head_dim: int, itemsize: int, q_block: int, *, amd: bool = False
) -> int:
    """Bytes of shared memory that a program of the portable kernel takes at most.

    Queries, the tiles of keys and values that are in flight, and in 32 bits, whose products read
    shared memory, the weights or, behind descriptors, a transposed tile. What Triton 3.6 and 3.9
    take beyond that for Ampere and Hopper is below 2 KiB.

    AMD's matrix instructions read registers. What is in flight waits there, and shared memory holds
    queries on their way to them, or later a tile of keys, one of values, and weights.

    Args:
        tile: from `choose_tile`.
        head_dim, itemsize, q_block: as there.
        amd: whether the GPU is one of AMD's.
    """
    keys, queries = tile.keys * head_dim * itemsize, min(tile.queries, q_block)
    weights = queries * tile.keys * itemsize
    if amd:
        return max(queries * head_dim * itemsize, 2 * keys + weights)
    if itemsize == 2:
        held = 2 * tile.stages * keys
    else:
        held = 2 * keys + (max(keys, weights) if tile.tma else weights)
    return queries * head_dim * itemsize + held + 2048
