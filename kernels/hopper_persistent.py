"""Launches the Hopper kernel whose programs take several query blocks each."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from dit_sparse.backend import AttentionOutput
from dit_sparse.kernels._hopper_persistent import _block_sparse_fwd_hopper_persistent
from dit_sparse.kernels.hopper import Matrix, describe, matrices_of, with_scratch
from dit_sparse.kernels.launch import Launch, launch_specialised
from dit_sparse.kernels.longest_first import longest_first
from dit_sparse.kernels.portable import LOG2_E, list_strides, padded
from dit_sparse.mask_product import COLUMNS, FLOOR, MaskProduct
from dit_sparse.plan import BlockPlan

_MOST = 8  # query blocks to a program: what is left to hide then is an eighth of a block's
_ROUNDS = 3  # of programs at least, so that short lists make up for long ones
_MANY_ROUNDS = 16  # with so many it does not matter that the last one is not full
_START_AND_END = 2.0  # of a program, in the time of one key block [H200]

# Programs with several query blocks each spread over more of a head at a time: where its keys and
# values fill most of L2, neighbours no longer find them there [H200, 50 MB].
_SMALL_HEAD = 18e6
#: Head dims above 64 have one program to a multiprocessor, which starts and ends alone. That is
#: worth hiding for short lists; with longer ones the plain kernel is faster [H200].
_SHORT_LIST = 40.0


def blocks_each(q: Tensor, plan: BlockPlan, *, masked: bool, places: int | None = None) -> int:
    """How many query blocks a program should take; 1 for the kernel with one to each.

    Waits for nothing: lists count with the mean of their lengths, and where some are much longer
    no more than two share a program, which would otherwise be the last to end.

    Args:
        masked: whether a mask takes part, which takes shared memory.
        places: programs that run at the same time; `None`: those of the device of q.
    """
    tiles = q.shape[0] * q.shape[1] * plan.q_blocks.n
    entries = max(plan.indices.numel() / plan.offsets.numel(), 1.0)
    dim = padded(q.shape[-1])
    small = 2 * plan.k_blocks.n * plan.k_blocks.size * dim * q.element_size() <= _SMALL_HEAD
    # Begun in another order, masks leave few exponentials under its products [sm_90, Triton 3.6].
    alone = masked and plan.uneven
    if dim > 64 and (alone or not (small and entries <= _SHORT_LIST)):
        return 1
    slots = _slots(q.device, dim, masked) if places is None else places
    return _soonest(tiles, entries, slots, _MOST if small and not plan.uneven else 2)


def _soonest(tiles: int, entries: float, slots: int, most: int) -> int:
    """The number of tiles to a program, of which `slots` run at the same time."""

    def rounds(each: int) -> float:
        exact = tiles / (each * slots)
        return exact if exact > _MANY_ROUNDS else math.ceil(exact)

    def cost(each: int) -> float:
        return rounds(each) * (each * entries + _START_AND_END)

    fitting = [each for each in range(1, most + 1) if each == 1 or rounds(each) >= _ROUNDS]
    return min(fitting, key=cost)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    result: AttentionOutput,
    *,
    each: int,
    mask: MaskProduct | None = None,
    lengths: tuple[Tensor, Tensor] | None = None,
) -> Launch | None:
    """`hopper.launch` with several query blocks to a program.

    Args:
        each: how many.
        q, k, v, plan, scale, result, mask, lengths: as there.
    """
    matrices = matrices_of(q, k, v, plan)
    if matrices is None:
        return None
    return with_scratch(
        functools.partial(_launch, q, matrices, plan, scale, result, each, mask, lengths)
    )


def _launch(
    q: Tensor,
    matrices: tuple[Matrix, Matrix, Matrix],
    plan: BlockPlan,
    scale: float,
    result: AttentionOutput,
    each: int,
    mask: MaskProduct | None,
    lengths: tuple[Tensor, Tensor] | None,
) -> Launch | None:
    qm, km, vm = matrices
    out, lse = result
    batch, heads, n_queries, head_dim = q.shape
    dim, keys, blocks = padded(head_dim), plan.k_blocks.size, plan.q_blocks.n
    picture = plan.q_blocks.picture or range(blocks)
    starts, counts = plan.spans
    order = starts if plan.order is None else plan.order.index
    queue = longest_first(plan, batch, heads)
    tiles = batch * heads * blocks
    arguments = (
        q, km.describe([keys, dim]), vm.describe([keys, dim]),
        mask.queries if mask else starts, describe(mask) if mask else None,
        out, lse, *(lengths or (lse, lse)),
        plan.offsets, plan.full, plan.partial, mask.starts if mask else starts, counts,
        mask.query if mask else starts, mask.entry if mask else starts,
        plan.q_blocks.starts, order, starts if queue is None else queue,
        *qm.shape, qm.row_stride, *qm.origin, *km.origin, *vm.origin, *out.stride()[:3],
        *list_strides(plan), order.stride(0) if order.ndim == 2 else 0,
        mask.query.stride(0) if mask and len(mask.query) > 1 else 0,
        tiles, each, heads, heads // km.heads, blocks, blocks - len(picture), picture.start,
        n_queries, mask.queries.shape[:2].numel() if mask else 0,
        scale * LOG2_E, FLOOR * scale * LOG2_E if mask else float("-inf"),
    )  # fmt: skip
    constants = {
        "D": head_dim,
        "BLOCK_D": dim,
        "BLOCK_M": plan.q_blocks.size,
        "BLOCK_N": keys,
        "RAGGED": plan.k_blocks.ragged and mask is None,
        "HAS_ORDER": plan.order is not None,
        "COLUMNS": COLUMNS if mask else 0,
        "BOUND": lengths is not None,
        "QUEUED": queue is not None,
    }
    outer = batch * heads * (blocks - len(picture))  # blocks around it have a program each
    kernel, grid = _block_sparse_fwd_hopper_persistent, (outer + -(-(tiles - outer) // each), 1, 1)
    return launch_specialised(kernel, grid, arguments, constants, warps=4, stages=2)


@functools.cache
def _slots(device: torch.device, head_dim: int, masked: bool) -> int:
    """Programs that run at the same time: two share a multiprocessor where they fit."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return multiprocessors * (2 if head_dim <= 64 and not masked else 1)
