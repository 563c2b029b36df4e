"""Summaries of q, k and v that are in the order of a plan. Launched by `summaries.py`."""

import triton
import triton.language as tl


@triton.jit
def _summaries_fwd(
    q_ptr, k_ptr, v_ptr, centres_ptr, means_ptr, norm_ptr, longest_ptr, starts_ptr, hidden_ptr,
    q_stride_b, q_stride_h, q_stride_n,
    k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n,
    hidden_stride_b, n_heads, n_tokens, n_blocks, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    HAS_HIDDEN: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """A block of q, of k, or with VALUES of v to a program, read in runs of ROWS rows.

    Centres are means in fp32, those of q multiplied by `scale`, then those of k. Means are those of
    k and v in their dtype, zeros where the block is hidden: it may hold anything, also NaN, which
    no weight of 0 hides. For the same reason no key of it is the longest.
    """
    which = tl.program_id(2)
    x_ptr, stride_b, stride_h, stride_n = q_ptr, q_stride_b, q_stride_h, q_stride_n
    if which == 1:
        x_ptr, stride_b, stride_h, stride_n = k_ptr, k_stride_b, k_stride_h, k_stride_n
    if which == 2:
        x_ptr, stride_b, stride_h, stride_n = v_ptr, v_stride_b, v_stride_h, v_stride_n
    # Heads are neighbours in the launch order, as they mostly are in memory.
    pair = tl.program_id(0)
    pairs = tl.num_programs(0)
    block = tl.program_id(1)
    head = pair % n_heads
    batch = pair // n_heads
    start = tl.load(starts_ptr + block)
    length = tl.load(starts_ptr + block + 1) - start
    x_ptr += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    norm_ptr += pair.to(tl.int64) * n_tokens
    cols = tl.arange(0, BLOCK_D)

    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    longest = tl.zeros([ROWS], tl.float32)
    for row in tl.static_range(0, SIZE, ROWS):
        within = row + tl.arange(0, ROWS)
        inside = (within < length)[:, None] & (cols < D)[None, :]
        rows = (start + within).to(tl.int64)
        x = tl.load(x_ptr + rows[:, None] * stride_n + cols[None, :], mask=inside, other=0.0)
        wide = x.to(tl.float32)
        total += wide
        norm = tl.sqrt(tl.sum(wide * wide, 1))
        longest = tl.maximum(longest, norm)
        if which == 0:
            tl.store(norm_ptr + rows, norm, mask=within < length)

    mean = tl.sum(total, 0) / tl.maximum(length, 1)
    at = pair.to(tl.int64) * n_blocks + block
    of_tensor = pairs.to(tl.int64) * n_blocks
    if which < 2:
        centre = tl.where(which == 0, mean * scale, mean)
        tl.store(centres_ptr + (which * of_tensor + at) * D + cols, centre, mask=cols < D)
    if which > 0:
        top = tl.max(longest, 0)
        if HAS_HIDDEN:
            hides = tl.load(hidden_ptr + batch * hidden_stride_b + block) != 0
            mean = tl.where(hides, 0.0, mean)
            top = tl.where(hides, 0.0, top)
        if which == 1:
            tl.store(longest_ptr + at, top)
        if VALUES:
            means_ptr += ((which - 1) * of_tensor + at) * D
            tl.store(means_ptr + cols, mean.to(means_ptr.dtype.element_ty), mask=cols < D)
