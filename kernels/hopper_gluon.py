"""Launches the Hopper kernel in Gluon, a program of which runs on every multiprocessor."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from dit_sparse.backend import AttentionOutput
from dit_sparse.kernels.dealt import dealt
from dit_sparse.kernels.hopper import Matrix, matrices_of
from dit_sparse.kernels.launch import GluonDescriptor, Launch, launch_specialised
from dit_sparse.kernels.portable import LOG2_E, list_strides, padded
from dit_sparse.mask_product import COLUMNS, FLOOR, MaskProduct
from dit_sparse.plan import BlockPlan
from dit_sparse.shares import highest

try:
    from triton.experimental.gluon.language import NVMMASharedLayout

    from dit_sparse.kernels._gluon_fetch import ROWS
    from dit_sparse.kernels._hopper_gluon import _block_sparse_fwd_hopper_gluon
except ImportError:  # a Triton without Gluon, or without what this needs of it
    _block_sparse_fwd_hopper_gluon = None

#: Gluon changes with every version of Triton; this is the one that the machine code was read of.
TRITON = "3.6"

#: Biases further from 0 would come near to hidden scores (`FLOOR`) at the smallest scale for masks.
_MOST_BIAS = 4096.0


@dataclass(frozen=True)
class Rings:
    """How many tiles have room in shared memory.

    Args:
        queries: query blocks, 1 or 2.
        keys: key blocks.
        values: as many, or one more.
    """

    queries: int
    keys: int
    values: int

    def __post_init__(self) -> None:
        if self.queries not in (1, 2) or self.keys < 2 or self.values - self.keys not in (0, 1):
            raise ValueError(
                f"Expected room for 1 or 2 query blocks, 2 or more of keys and as many of values "
                f"or one more, got {self}. Others wait for themselves."
            )


def rings_for(head_dim: int) -> Rings:
    """What fits 227 KiB for a padded head dim and was fastest [H200]."""
    if head_dim <= 64:
        return Rings(queries=2, keys=4, values=4)
    return Rings(queries=1, keys=2, values=3)


def unavailable() -> str | None:
    """Why no kernel in Gluon can run here; `None` if they can."""
    if _block_sparse_fwd_hopper_gluon is None:
        return f"expected a Triton with Gluon for Hopper, got {triton.__version__}."
    if ".".join(triton.__version__.split(".")[:2]) != TRITON:
        return f"expected Triton {TRITON}, whose Gluon was tried, got {triton.__version__}."
    if triton.knobs.runtime.interpret:
        return "expected a GPU, got Triton's interpreter, which has no Gluon."
    return None


def refuses(plan: BlockPlan, scale: float) -> str | None:
    """Why the kernel cannot run here, or not for a plan; `None` if it can."""
    if (reason := unavailable()) is not None:
        return reason
    if (plan.q_blocks.size, plan.k_blocks.size) != (128, 128):
        return f"expected blocks of 128, got {plan.q_blocks.size} and {plan.k_blocks.size}."
    if not scale > 0:  # scores behind the end of a block are hidden before they are scaled
        return f"expected a positive scale, got {scale}."
    if plan.bias is not None and not (most := _most_bias(plan)) <= _MOST_BIAS:
        return f"expected biases from {-_MOST_BIAS:g} to {_MOST_BIAS:g}, got one {most:g} from 0."
    return None


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    result: AttentionOutput,
    *,
    mask: MaskProduct | None = None,
    lengths: tuple[Tensor, Tensor] | None = None,
    rings: Rings | None = None,
) -> Launch | None:
    """`hopper.launch` in Gluon, with biases and words; `None` too for what it `refuses`.

    Args:
        plan: of entries that are `weighing`.
        rings: `None` for those of `rings_for`.
        q, k, v, scale, result, mask, lengths: as there.
    """
    if refuses(plan, scale) is not None:
        return None
    matrices = matrices_of(q, k, v, plan)
    if matrices is None:
        return None
    chosen = rings or rings_for(padded(q.shape[-1]))
    return _launch(q, matrices, plan, scale, result, mask, lengths, chosen)


def _launch(
    q: Tensor,
    matrices: tuple[Matrix, Matrix, Matrix],
    plan: BlockPlan,
    scale: float,
    result: AttentionOutput,
    mask: MaskProduct | None,
    lengths: tuple[Tensor, Tensor] | None,
    rings: Rings,
) -> Launch | None:
    qm, km, vm = matrices
    out, lse = result
    batch, heads, n_queries, head_dim = q.shape
    dim, keys, blocks = padded(head_dim), plan.k_blocks.size, plan.q_blocks.n
    starts, counts = plan.spans
    order = starts if plan.order is None else plan.order.index
    tiles = batch * heads * blocks
    programs = min(tiles, multiprocessors(q.device))
    deal = dealt(plan, batch, heads, programs)
    classes, hidden, patterns = _tiles(mask, q.dtype) if mask else (None, None, starts)
    biases = (starts, starts) if plan.bias is None else _biases(plan, mask)
    arguments = (
        describe(qm, [ROWS.value, dim]), describe(km, [keys, dim]), describe(vm, [keys, dim]),
        classes, hidden, out, lse, *(lengths or (lse, lse)),
        plan.offsets, plan.full, plan.partial, mask.starts if mask else starts, counts,
        mask.query if mask else starts, patterns, plan.q_blocks.starts, order,
        *(deal or (starts, starts)), *biases, starts if plan.words is None else plan.words,
        *qm.origin, *km.origin, *vm.origin, *out.stride()[:3],
        *list_strides(plan), order.stride(0) if order.ndim == 2 else 0,
        mask.query.stride(0) if mask and len(mask.query) > 1 else 0,
        tiles, heads, heads // km.heads, blocks, n_queries,
        scale * LOG2_E, FLOOR * scale * LOG2_E if mask else float("-inf"),
    )  # fmt: skip
    constants = {
        "D": head_dim,
        "BLOCK_D": dim,
        "BLOCK_N": keys,
        "RAGGED": plan.k_blocks.ragged and mask is None,
        "HAS_ORDER": plan.order is not None,
        "BOUND": lengths is not None,
        "DEALT": deal is not None,
        "COLUMNS": COLUMNS if mask else 0,
        "HAS_BIAS": plan.bias is not None,
        "HAS_WORDS": plan.words is not None,
        "Q_SLOTS": rings.queries,
        "SLOTS": rings.keys,
        "V_SLOTS": rings.values,
    }
    kernel, grid = _block_sparse_fwd_hopper_gluon, (programs, 1, 1)
    return launch_specialised(kernel, grid, arguments, constants, warps=4, stages=2)


def describe(matrix: Matrix, block: list[int]) -> Any:
    """A descriptor of tiles as the matrix units read them."""
    layout = NVMMASharedLayout(128, 8 * matrix.base.element_size(), 2)
    shape, strides = list(matrix.shape), [matrix.row_stride, 1]
    return GluonDescriptor(matrix.base, shape, strides, block, layout)


def _tiles(mask: MaskProduct, dtype: torch.dtype) -> tuple[Any, Any, Tensor]:
    """Blocks of queries and of keys of a mask, one below the other, in the dtype of what the
    scores are a product of; int32 `[E]`, which of these each entry reads, -1 where it hides no key.

    Kept with the mask.
    """
    known: dict[torch.dtype, tuple[Any, Any, Tensor]] = vars(mask).setdefault("_in_gluon", {})
    if dtype not in known:
        layout = NVMMASharedLayout(2 * COLUMNS, 16, 2)
        queries, keys = (rows.to(dtype) for rows in (mask.queries, mask.keys))
        hides = (keys != 0).flatten(1).any(1)
        known[dtype] = (
            *(
                GluonDescriptor(rows.flatten(0, 1), [rows.shape[:2].numel(), COLUMNS],
                                [COLUMNS, 1], [block, COLUMNS], layout)
                for rows, block in ((queries, ROWS.value), (keys, keys.shape[1]))
            ),
            torch.where(hides[mask.entry.long()], mask.entry, -1).int(),
        )  # fmt: skip
    return known[dtype]


def _biases(plan: BlockPlan, mask: MaskProduct | None) -> tuple[Tensor, Tensor]:
    """Biases as powers of 2: of each entry where the kernel reads it, and the highest of each row.

    Kept with the plan.
    """
    known: dict[bool, tuple[Tensor, Tensor]] = vars(plan).setdefault("_as_powers", {})
    if (masked := mask is not None) not in known:
        assert plan.bias is not None
        bias = plan.bias if mask is None else plan.bias[mask.place]
        known[masked] = bias * LOG2_E, highest(plan) * LOG2_E
    return known[masked]


def _most_bias(plan: BlockPlan) -> float:
    """How far the biases are from 0 at most; asks the device once for a plan."""
    known: dict[str, float] = vars(plan)
    if "_most_bias" not in known:
        assert plan.bias is not None
        known["_most_bias"] = float(plan.bias.abs().max()) if len(plan.bias) else 0.0
    return known["_most_bias"]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
