"""What `compile_kernels.py` compiles for AMD's GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dit_sparse.kernels.approximate import AMD_TILE
from scripts.machine_code import Q_BLOCK, Variant


def gpus(every: bool) -> tuple[str, ...]:
    """MI300, MI200 and Radeon RX 7900; and those that came after them."""
    several = ("gfx942", "gfx90a", "gfx1100")
    return (*several, "gfx950", "gfx1201") if every else several


def portable(every: bool) -> Iterator[Variant]:
    """The kernel for exact entries."""
    for gpu in gpus(every):
        radeon = gpu.startswith("gfx1")
        for head_dim in (64, 128) if radeon else (64, 128, 256):
            for box in (False, True):
                yield Variant("portable", gpu, head_dim, ragged=True, box=box)
                if head_dim == 64 or not radeon:
                    yield Variant("portable", gpu, head_dim, True, box=box, dtype="fp32")
        yield Variant("portable", gpu, 128, ragged=True, disk=True)
        yield Variant("portable", gpu, 128, ragged=True, words=True, biased=True)
        yield Variant("portable", gpu, 128, ragged=True, dtype="fp16")
        yield Variant("portable", gpu, 64, ragged=True, queued=True)


def approximations(every: bool) -> Iterator[Variant]:
    """What puts tokens in order, adds means and tails, and would plan."""
    for gpu in gpus(every):
        for kernel in (
            *("means", "importance", "take", "choose"),
            *("longest_first", "covariance", "permute_rows"),
        ):
            yield Variant(kernel, gpu, 128, ragged=True)
        for tail in range(4):
            yield Variant("approximate", gpu, 128, ragged=True, tail=tail)


def maps(every: bool) -> Iterator[Variant]:
    """The kernel for a calibration's statistics."""
    for gpu in gpus(every):
        yield Variant("map", gpu, 128, ragged=True)


def of_approximate(constants: dict[str, Any]) -> tuple[dict[str, Any], int, int]:
    """The constants of the kernel for means and tails, warps and stages."""
    rows, columns, warps, stages = AMD_TILE
    tile = {"BLOCK_M": rows, "PARTS": Q_BLOCK // rows, "BLOCK_N": columns, "CHUNK": 32}
    return constants | tile, warps, stages
