"""Launches the warp-specialised Hopper kernel, for a plan's exact entries."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor

from dit_sparse.backend import AttentionOutput
from dit_sparse.kernels._hopper import _block_sparse_fwd_hopper
from dit_sparse.kernels.architecture import architecture
from dit_sparse.kernels.launch import (
    Launch,
    Repeat,
    TensorDescriptor,
    launch_specialised,
    with_scratch,
)
from dit_sparse.kernels.longest_first import longest_first
from dit_sparse.kernels.portable import LOG2_E, list_strides, padded
from dit_sparse.kernels.variants import Kernel, masked_kernel, whole_kernel
from dit_sparse.mask_product import COLUMNS, FLOOR, MaskProduct
from dit_sparse.plan import BlockPlan, Blocks


@dataclass(frozen=True)
class Matrix:
    """A tensor `[B, H, N, D]` seen as a matrix, the only shape that specialised loads take.

    Token n of (b, h) is row `b * row_b + h * row_h + n`, from column `h * col_h` on.
    """

    base: Tensor
    shape: tuple[int, int]
    row_stride: int
    row_b: int
    row_h: int
    col_h: int

    @staticmethod
    def of(x: Tensor) -> Matrix | None:
        """`None` for strides that are neither heads over tokens nor tokens over heads."""
        batch, heads, tokens, dim = x.shape
        stride_b, stride_h, stride_n, unit = x.stride()
        size = x.element_size()
        if unit != 1 or stride_n * size % 16 or stride_n < dim or x.data_ptr() % 16:
            return None
        if batch == 1:
            stride_b = 0
        if stride_b % stride_n:
            return None
        if heads == 1:
            stride_h = 0
        rows = (batch - 1) * stride_b // stride_n + tokens
        if stride_h % stride_n == 0:
            row_h = stride_h // stride_n
            shape = (rows + (heads - 1) * row_h, dim)
            return Matrix(x, shape, stride_n, stride_b // stride_n, row_h, 0)
        width = (heads - 1) * stride_h + dim
        # Tiles are as wide as the padded head dim: they must not reach into the next head.
        if width > stride_n or padded(dim) != dim:
            return None
        return Matrix(x, (rows, width), stride_n, stride_b // stride_n, 0, stride_h)

    def describe(self, block: list[int]) -> Any:
        return TensorDescriptor(self.base, list(self.shape), [self.row_stride, 1], block)

    @property
    def ends_in_itself(self) -> bool:
        """Whether the rows behind the last token of a head are of this tensor too, or none.

        In a slice of a larger tensor they may hold anything, also NaN, which no weight of 0 hides.
        """
        batch, heads, tokens, _ = self.base.shape
        if self.col_h or heads == 1:
            return batch == 1 or self.row_b == tokens
        return self.row_h == tokens and (batch == 1 or self.row_b == heads * tokens)

    @property
    def heads(self) -> int:
        return self.base.shape[1]

    @property
    def origin(self) -> tuple[int, int, int]:
        return (self.row_b, self.row_h, self.col_h)


def runs(q: Tensor, v: Tensor, plan: BlockPlan) -> bool:
    """Whether the kernel was built for this problem: Hopper, 16 bit, blocks of 128."""
    return plan.q_blocks.size == 128 and suits(q, v, plan.k_blocks)


def suits(q: Tensor, v: Tensor, k_blocks: Blocks) -> bool:
    """`runs`, as far as tensors and blocks of keys decide it."""
    return (
        chosen(q, k_blocks) != "portable"
        and q.shape[-1] == v.shape[-1]
        and k_blocks.size == 128  # blocks of 64 gave NaN under Triton 3.6
    )


def chosen(q: Tensor, k_blocks: Blocks) -> Kernel:
    """What the table says of the kernel for entries that need no mask."""
    return whole_kernel(
        architecture(q.device),
        triton.__version__,
        str(q.dtype).removeprefix("torch."),
        padded(q.shape[-1]),
        k_blocks.ragged,
    )


def masks(q: Tensor) -> bool:
    """Whether the table has the kernel compute masked entries too; in Triton's interpreter it
    does."""
    if not q.is_cuda:
        return True
    return masked_kernel(architecture(q.device), triton.__version__) != "portable"


def mask_of(plan: BlockPlan, scale: float) -> MaskProduct | None:
    """What `launch` masks partial entries with; `None` where it leaves them to another kernel.

    Args:
        scale: of the scores. A tiny one would leave hidden scores in sight.
    """
    return plan.mask_product if scale >= 1e-5 else None


def matrices_of(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan
) -> tuple[Matrix, Matrix, Matrix] | None:
    """`None` for strides that specialised loads do not take, see `Matrix`."""
    qm, km, vm = (Matrix.of(t) for t in (q, k, v))
    if qm is None or km is None or vm is None:
        return None
    if plan.k_blocks.ragged and not (km.ends_in_itself and vm.ends_in_itself):
        return None
    return qm, km, vm


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
) -> Launch | None:
    """Writes `result`; `None`, and nothing written, if some strides do not allow it.

    Args:
        q, k, v: `[B, H, N, D]` in plan order; each head of k and v is for as many of q.
        mask: `mask_of` the plan, for partial entries too; without it `result` gets the full ones.
        lengths: of the queries and of the longest key, see `norms`. The bounds that follow from
            them are subtracted from the scores instead of running maxima. Rows whose scores are all
            too far below theirs get an infinite LSE: run the portable kernel's repair. For
            bfloat16, which has the exponents of float32.
    """
    matrices = matrices_of(q, k, v, plan)
    if matrices is None:
        return None
    return with_scratch(functools.partial(_launch, q, matrices, plan, scale, result, mask, lengths))


def repeat(launches: Sequence[Repeat], tensors: Sequence[Tensor]) -> None:
    """Runs launches of this kernel, and any others, again."""
    for one in launches:
        one(tensors)


def _launch(
    q: Tensor,
    matrices: tuple[Matrix, Matrix, Matrix],
    plan: BlockPlan,
    scale: float,
    result: AttentionOutput,
    mask: MaskProduct | None,
    lengths: tuple[Tensor, Tensor] | None,
) -> Launch | None:
    qm, km, vm = matrices
    out, lse = result
    batch, heads, n_queries, head_dim = q.shape
    dim, keys = padded(head_dim), plan.k_blocks.size
    starts, counts = plan.spans
    n_blocks = plan.q_blocks.n
    picture = plan.q_blocks.picture or range(n_blocks)
    order = starts if plan.order is None else plan.order.index
    queue = longest_first(plan, batch, heads)
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
        heads, heads // km.heads, n_blocks, n_blocks - len(picture), picture.start, n_queries,
        mask.queries.shape[:2].numel() if mask else 0,
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
    kernel, grid = _block_sparse_fwd_hopper, (batch * heads * n_blocks, 1, 1)
    return launch_specialised(kernel, grid, arguments, constants, warps=4, stages=2)


def describe(mask: MaskProduct) -> Any:
    """A descriptor of the blocks of keys, one below the other."""
    rows = mask.keys.flatten(0, 1)
    return TensorDescriptor(rows, list(rows.shape), [COLUMNS, 1], [mask.keys.shape[1], COLUMNS])
