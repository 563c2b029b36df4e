"""Means of keys and values and their covariance in one pass over both. Launched by `summary.py`."""

import triton
import triton.language as tl


@triton.jit
def _summary_fwd(
    k_ptr, v_ptr, k_mean_ptr, v_mean_ptr, sum_ptr, hidden_ptr, starts_ptr,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n, hidden_stride_b,
    n_heads, n_blocks, width, n_chunks, per_chunk,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SIZE: tl.constexpr, HAS_HIDDEN: tl.constexpr,
):  # fmt: skip
    """A chunk of blocks: every block's means, rounded, and the sum of the covariances."""
    pid = tl.program_id(0)
    chunk = pid % n_chunks
    head = (pid // n_chunks) % n_heads
    batch = pid // n_chunks // n_heads
    pair = (batch * n_heads + head).to(tl.int64)
    k_cols = tl.arange(0, BLOCK_D)
    v_cols = tl.arange(0, BLOCK_DV)
    k_ptr += batch.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
    v_ptr += batch.to(tl.int64) * v_stride_b + head.to(tl.int64) * v_stride_h
    k_mean_ptr += pair * width * D
    v_mean_ptr += pair * width * DV
    total = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
    first = chunk * per_chunk
    for block in range(first, tl.minimum(first + per_chunk, n_blocks)):
        start = tl.load(starts_ptr + block)
        stop = tl.load(starts_ptr + block + 1)
        if HAS_HIDDEN:  # it may hold anything, also NaN, which no weight of 0 hides
            hidden = tl.load(hidden_ptr + batch * hidden_stride_b + block)
            stop = tl.where(hidden != 0, start, stop)
        tokens = start + tl.arange(0, SIZE)
        inside = tokens < stop
        at = tokens.to(tl.int64)[:, None]
        k_inside = inside[:, None] & (k_cols < D)[None, :]
        v_inside = inside[:, None] & (v_cols < DV)[None, :]
        k = tl.load(k_ptr + at * k_stride_n + k_cols[None, :], mask=k_inside, other=0.0)
        v = tl.load(v_ptr + at * v_stride_n + v_cols[None, :], mask=v_inside, other=0.0)
        length = tl.maximum(stop - start, 1).to(tl.float32)
        k_mean = tl.sum(k.to(tl.float32), 0) / length
        v_mean = tl.sum(v.to(tl.float32), 0) / length
        k_ptrs = k_mean_ptr + block * D + k_cols
        tl.store(k_ptrs, k_mean.to(k_mean_ptr.dtype.element_ty), mask=k_cols < D)
        v_ptrs = v_mean_ptr + block * DV + v_cols
        tl.store(v_ptrs, v_mean.to(v_mean_ptr.dtype.element_ty), mask=v_cols < DV)
        # Rows past the end of the block hold zeros in v: what k has there does not count.
        centred = k.to(tl.float32) - k_mean[None, :]
        total = tl.dot(tl.trans(centred.to(v.dtype)), v, total, input_precision="ieee")
    matrix = k_cols[:, None] * DV + v_cols[None, :]
    matrix_inside = (k_cols < D)[:, None] & (v_cols < DV)[None, :]
    sum_ptr += (pair * n_chunks + chunk) * D * DV
    tl.store(sum_ptr + matrix, total, mask=matrix_inside)
