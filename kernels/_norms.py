"""Lengths of queries, and of the longest key. Launched by `norms.py`."""

import triton
import triton.language as tl


@triton.jit
def _norms(
    q_ptr, k_ptr, norm_ptr, longest_ptr,
    q_stride_b, q_stride_h, q_stride_n,
    k_stride_b, k_stride_h, k_stride_n,
    n_heads, group, n_queries, n_keys,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1)
    head = pair % n_heads
    batch = (pair // n_heads).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    if tl.program_id(2) == 0:
        x_ptr = q_ptr + batch * q_stride_b + head.to(tl.int64) * q_stride_h
        stride, length = q_stride_n, n_queries
    else:
        x_ptr = k_ptr + batch * k_stride_b + (head // group).to(tl.int64) * k_stride_h
        stride, length = k_stride_n, n_keys
    inside = (rows[:, None] < length) & (cols[None, :] < D)
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, 1))
    if tl.program_id(2) == 0:
        tl.store(norm_ptr + pair.to(tl.int64) * n_queries + rows, norm, mask=rows < length)
    else:
        tl.atomic_max(longest_ptr + pair, tl.max(norm, 0))
