"""Adds the first-order term of a tail to a result that has its means already."""

from __future__ import annotations

from torch import Tensor

from dit_sparse.kernels._slope import _slope_fwd
from dit_sparse.kernels.pool import pool, slope
from dit_sparse.kernels.portable import padded
from dit_sparse.plan import BlockPlan

_ROWS = 128


def add(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, share: Tensor, out: Tensor
) -> None:
    """Adds `share * scale * q @ H` to `out`, H being the mean key-value covariance per token.

    Args:
        q: `[B, H, N, D]` in the order of `share` and `out`, unit stride along D.
        k, v: in plan order, of the same head dim; rows behind the plan's tokens are not read.
        share: fp32 `[B, H, N]`, of the softmax that the means have.
    """
    batch, heads, n_queries, dim = q.shape
    matrix = slope(k, v, plan.k_blocks, pool(k, plan.k_blocks), plan.hidden)
    _slope_fwd[(-(-n_queries // _ROWS), batch * heads)](
        q, matrix, share, out, *q.stride()[:3], *out.stride()[:3], heads, n_queries, scale,
        D=dim, BLOCK_D=padded(dim), ROWS=_ROWS, num_warps=8, num_stages=1,
    )  # fmt: skip
