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


@triton.jit
def _permute_blocks(
    x0_ptr, x1_ptr, x2_ptr, out_ptr, index_ptr, starts_ptr, hidden_ptr, norm_ptr, longest_ptr,
    x0_stride_b, x0_stride_h, x0_stride_n,
    x1_stride_b, x1_stride_h, x1_stride_n,
    x2_stride_b, x2_stride_h, x2_stride_n,
    index_stride_h, hidden_stride_b, n_heads, n_tokens, n_blocks, out_rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SIZE: tl.constexpr, MOVED: tl.constexpr,
    SKIPPED: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_HIDDEN: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """Puts the last MOVED of x0, x1, x2 in order, block by block, and behind each head of the last
    two the means of all blocks; blocks beyond the last are zeros there.

    NORMS: as in `_permute_rows`. The first SKIPPED tensors have no programs.
    """
    which = tl.program_id(2) + SKIPPED
    x_ptr, stride_b, stride_h, stride_n = x0_ptr, x0_stride_b, x0_stride_h, x0_stride_n
    if which == 1:
        x_ptr, stride_b, stride_h, stride_n = x1_ptr, x1_stride_b, x1_stride_h, x1_stride_n
    if which == 2:
        x_ptr, stride_b, stride_h, stride_n = x2_ptr, x2_stride_b, x2_stride_h, x2_stride_n
    block = tl.program_id(0)
    pair = tl.program_id(1)
    head = pair % n_heads
    batch = pair // n_heads
    start = tl.load(starts_ptr + block, mask=block < n_blocks, other=0)
    length = tl.load(starts_ptr + block + 1, mask=block < n_blocks, other=0) - start
    within = tl.arange(0, SIZE)
    cols = tl.arange(0, BLOCK_D)
    row_inside = within < length
    inside = row_inside[:, None] & (cols < D)[None, :]
    source = (start + within).to(tl.int64)
    if HAS_ORDER:
        index_ptr += head.to(tl.int64) * index_stride_h
        source = tl.load(index_ptr + start + within, mask=row_inside, other=0)
    x_ptr += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    tile = tl.load(x_ptr + source[:, None] * stride_n + cols[None, :], mask=inside, other=0.0)
    wide = tile.to(tl.float32)
    # The results stand behind one another, each [B, H, out_rows, D].
    first = ((which - (3 - MOVED)) * tl.num_programs(1) + pair).to(tl.int64) * out_rows
    if which >= 3 - MOVED:
        out_row = first + start + within
        tl.store(out_ptr + out_row[:, None] * D + cols[None, :], tile, mask=inside)
    if HAS_HIDDEN:  # it may hold anything, also NaN, which no weight of 0 hides
        hidden_ptr += batch * hidden_stride_b + block
        hides = (which > 0) & (tl.load(hidden_ptr, mask=block < n_blocks, other=1) != 0)
        wide = tl.where(hides, 0.0, wide)
    if which > 0:
        mean = tl.sum(wide, 0) / tl.maximum(length, 1)
        out_ptr += (first + n_tokens + block) * D
        tl.store(out_ptr + cols, mean.to(out_ptr.dtype.element_ty), mask=cols < D)
    if NORMS and which < 2:
        norm = tl.sqrt(tl.sum(wide * wide, 1))
        if which == 0:
            at = pair.to(tl.int64) * n_tokens + start + within
            tl.store(norm_ptr + at, norm, mask=row_inside)
        else:
            tl.atomic_max(longest_ptr + pair, tl.max(norm, 0))
