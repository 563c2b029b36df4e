"""Row gather along the sequence. Launched by `permute.py`."""

import triton
import triton.language as tl


@triton.jit
def _permute_rows(
    x_ptr, out_ptr, index_ptr,
    x_stride_b, x_stride_h, x_stride_n,
    out_stride_b, out_stride_h, out_stride_n,
    index_stride_h, n_heads, n_tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1) % n_heads
    batch = tl.program_id(1) // n_heads
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    source = tl.load(index_ptr + head * index_stride_h + rows, mask=rows < n_tokens, other=0)
    inside = (rows[:, None] < n_tokens) & (cols[None, :] < D)
    x_ptr += batch.to(tl.int64) * x_stride_b + head.to(tl.int64) * x_stride_h
    out_ptr += batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    tile = tl.load(x_ptr + source[:, None] * x_stride_n + cols[None, :], mask=inside)
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * out_stride_n + cols[None, :], tile, mask=inside)
