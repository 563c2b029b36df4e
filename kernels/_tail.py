"""Biases of block means: which of them stand for their block in a row. Launched by `tail.py`."""

import triton
import triton.language as tl


@triton.jit
def _tail_bias_fwd(
    visited_ptr, hidden_ptr, starts_ptr, bias_ptr,
    visited_stride_b, visited_stride_h, hidden_stride_b, n_heads, n_q_blocks, n_k_blocks,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_HIDDEN: tl.constexpr,
):  # fmt: skip
    """log2 of a block's number of tokens where the tail stands for it, -inf elsewhere."""
    row = tl.program_id(0)
    block = row % n_q_blocks
    head = (row // n_q_blocks) % n_heads
    batch = row // n_q_blocks // n_heads
    visited_ptr += batch * visited_stride_b + head * visited_stride_h + block * n_k_blocks
    for first in tl.static_range(0, WIDTH, BLOCK):
        number = first + tl.arange(0, BLOCK)
        unseen = tl.load(visited_ptr + number, mask=number < n_k_blocks, other=1) == 0
        if HAS_HIDDEN:
            at = hidden_ptr + batch * hidden_stride_b + number
            unseen = unseen & (tl.load(at, mask=unseen, other=1) == 0)
        start = tl.load(starts_ptr + number, mask=unseen, other=0)
        stop = tl.load(starts_ptr + number + 1, mask=unseen, other=1)
        bias = tl.where(unseen, tl.math.log2((stop - start).to(tl.float32)), float("-inf"))
        tl.store(bias_ptr + row.to(tl.int64) * WIDTH + number, bias, mask=number < WIDTH)
