"""Which tile a block-sparse launch uses: a table, measured offline, never tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Compile-time choices of one launch.

    Args:
        keys: key rows of one tile; divides the plan's key block.
        warps: warps of a program.
        stages: depth of the load pipeline.
        tma: load keys and values through tensor descriptors (Hopper and later).
    """

    keys: int
    warps: int
    stages: int
    tma: bool


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
        boxed: whether entries are masked by coordinates, which takes registers.
    """
    keys = 128 if head_dim <= 64 else 64 if head_dim <= 128 else 32
    warps = 4
    if itemsize == 4:
        keys = 32
    elif boxed:
        keys = min(keys, 64)
    if q_block >= 128 and head_dim > (64 if boxed else 128):
        warps = 8
    return Tile(min(keys, k_block), warps, 2, tma=capability[0] >= 9)
