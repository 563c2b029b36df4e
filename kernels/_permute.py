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
    x0_ptr, x1_ptr, x2_ptr, out_ptr, means_ptr, centres_ptr, index_ptr, starts_ptr, hidden_ptr,
    norm_ptr, longest_ptr,
    x0_stride_b, x0_stride_h, x0_stride_n,
    x1_stride_b, x1_stride_h, x1_stride_n,
    x2_stride_b, x2_stride_h, x2_stride_n,
    index_stride_h, hidden_stride_b, n_heads, n_tokens, n_blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    SKIPPED: tl.constexpr, MOVE: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_HIDDEN: tl.constexpr,
    NORMS: tl.constexpr, CENTRES: tl.constexpr,
):  # fmt: skip
    """Puts x0, x1, x2 in order block by block, and makes the means of the blocks of the last two.

    A block is read in runs of ROWS rows, so that many programs have loads under way.

    The first SKIPPED tensors have no programs. MOVE: write the tensors in order. NORMS: as in
    `_permute_rows`. CENTRES: write the means of x1 in fp32 too.
    """
    which = tl.program_id(2) + SKIPPED
    x_ptr, stride_b, stride_h, stride_n = x0_ptr, x0_stride_b, x0_stride_h, x0_stride_n
    if which == 1:
        x_ptr, stride_b, stride_h, stride_n = x1_ptr, x1_stride_b, x1_stride_h, x1_stride_n
    if which == 2:
        x_ptr, stride_b, stride_h, stride_n = x2_ptr, x2_stride_b, x2_stride_h, x2_stride_n
    # Heads are neighbours in the launch order, as they mostly are in memory.
    pair = tl.program_id(0)
    pairs = tl.num_programs(0)
    block = tl.program_id(1)
    head = pair % n_heads
    batch = pair // n_heads
    start = tl.load(starts_ptr + block)
    length = tl.load(starts_ptr + block + 1) - start
    index_ptr += head.to(tl.int64) * index_stride_h
    x_ptr += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    cols = tl.arange(0, BLOCK_D)
    # The results stand behind one another, each [B, H, N, D].
    first = (which * pairs + pair).to(tl.int64) * n_tokens
    norm_ptr += pair.to(tl.int64) * n_tokens
    hides = False
    if HAS_HIDDEN:  # it may hold anything, also NaN, which no weight of 0 hides
        hidden_ptr += batch * hidden_stride_b + block
        hides = (which > 0) & (tl.load(hidden_ptr) != 0)

    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    longest = tl.zeros([ROWS], tl.float32)
    for row in tl.static_range(0, SIZE, ROWS):
        within = row + tl.arange(0, ROWS)
        row_inside = within < length
        inside = row_inside[:, None] & (cols < D)[None, :]
        places = start + within
        source = places.to(tl.int64)
        if HAS_ORDER:
            source = tl.load(index_ptr + places, mask=row_inside, other=0)
        tile = tl.load(x_ptr + source[:, None] * stride_n + cols[None, :], mask=inside, other=0.0)
        if MOVE:
            out_row = first + places
            tl.store(out_ptr + out_row[:, None] * D + cols[None, :], tile, mask=inside)
        wide = tile.to(tl.float32)
        if HAS_HIDDEN:
            wide = tl.where(hides, 0.0, wide)
        total += wide
        if NORMS:
            norm = tl.sqrt(tl.sum(wide * wide, 1))
            longest = tl.maximum(longest, norm)
            if which == 0:
                tl.store(norm_ptr + places, norm, mask=row_inside)

    if which > 0:
        mean = tl.sum(total, 0) / tl.maximum(length, 1)
        at = pair.to(tl.int64) * n_blocks + block
        if CENTRES:  # noqa: SIM102 (compile-time and run-time conditions do not mix)
            if which == 1:
                tl.store(centres_ptr + at * D + cols, mean, mask=cols < D)
        at += (which - 1) * pairs.to(tl.int64) * n_blocks
        tl.store(means_ptr + at * D + cols, mean.to(means_ptr.dtype.element_ty), mask=cols < D)
    if NORMS:  # noqa: SIM102
        if which == 1:
            tl.atomic_max(longest_ptr + pair, tl.max(longest, 0))
