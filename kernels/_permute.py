"""Row gather along the sequence. Launched by `permute.py`."""

import triton
import triton.language as tl


@triton.jit
def _permute_rows(
    x0_ptr, x1_ptr, x2_ptr, out_ptr, index_ptr, norm_ptr, longest_ptr,
    x0_stride_b, x0_stride_h, x0_stride_n,
    x1_stride_b, x1_stride_h, x1_stride_n,
    x2_stride_b, x2_stride_h, x2_stride_n,
    index_stride_h, n_heads, n_tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """NORMS: write lengths of the rows of x0 too, and of the longest row of x1 in each head."""
    which = tl.program_id(2)
    x_ptr, stride_b, stride_h, stride_n = x0_ptr, x0_stride_b, x0_stride_h, x0_stride_n
    if which == 1:
        x_ptr, stride_b, stride_h, stride_n = x1_ptr, x1_stride_b, x1_stride_h, x1_stride_n
    if which == 2:
        x_ptr, stride_b, stride_h, stride_n = x2_ptr, x2_stride_b, x2_stride_h, x2_stride_n
    pair = tl.program_id(1)
    head = pair % n_heads
    batch = pair // n_heads
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < n_tokens) & (cols[None, :] < D)
    index_ptr += head.to(tl.int64) * index_stride_h
    source = tl.load(index_ptr + rows, mask=rows < n_tokens, other=0)
    x_ptr += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    tile = tl.load(x_ptr + source[:, None] * stride_n + cols[None, :], mask=inside, other=0.0)
    # The results stand behind one another, each [B, H, N, D].
    out_row = (which * tl.num_programs(1) + pair).to(tl.int64) * n_tokens + rows
    tl.store(out_ptr + out_row[:, None] * D + cols[None, :], tile, mask=inside)
    if NORMS and which < 2:
        wide = tile.to(tl.float32)
        norm = tl.sqrt(tl.sum(wide * wide, 1))
        if which == 0:
            tl.store(norm_ptr + pair.to(tl.int64) * n_tokens + rows, norm, mask=rows < n_tokens)
        else:
            tl.atomic_max(longest_ptr + pair, tl.max(norm, 0))
