"""The first-order term that all block means share. Launched by `slope.py`."""

import triton
import triton.language as tl


@triton.jit
def _slope_fwd(
    q_ptr, slope_ptr, share_ptr, out_ptr,
    q_stride_b, q_stride_h, q_stride_n, out_stride_b, out_stride_h, out_stride_n,
    n_heads, n_queries, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`out + share * scale * q @ slope`."""
    pair = tl.program_id(1)
    head = pair % n_heads
    batch = pair // n_heads
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    inside = (rows < n_queries)[:, None] & (cols < D)[None, :]
    tokens = rows.to(tl.int64)[:, None]
    q_ptr += batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    out_ptr += batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    share_ptr += pair.to(tl.int64) * n_queries
    q = tl.load(q_ptr + tokens * q_stride_n + cols[None, :], mask=inside, other=0.0)
    share = tl.load(share_ptr + rows, mask=rows < n_queries, other=0.0)
    depth = tl.arange(0, BLOCK_D)
    matrix = slope_ptr + pair.to(tl.int64) * (D * D) + depth[:, None] * D + cols[None, :]
    slope = tl.load(matrix, mask=(depth < D)[:, None] & (cols < D)[None, :], other=0.0)
    # The share is at most 1, so that what it is multiplied by fits a 16-bit query.
    weighted = (q.to(tl.float32) * (share * scale)[:, None]).to(q.dtype)
    added = tl.dot(weighted, slope, input_precision="ieee")
    added = tl.where((share == 0.0)[:, None], 0.0, added)  # a weight of 0 hides no NaN
    out_ptrs = out_ptr + tokens * out_stride_n + cols[None, :]
    out = tl.load(out_ptrs, mask=inside, other=0.0).to(tl.float32) + added
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside)
