"""Biases of block means: which of them stand for their block in a row. Launched by `tail.py`."""

import triton
import triton.language as tl


@triton.jit
def _tail_bias_fwd(
    visited_ptr, hidden_ptr, starts_ptr, bias_ptr,
    visited_stride_b, visited_stride_h, hidden_stride_b, n_heads, n_q_blocks, n_k_blocks, unit,
    N_TILES: tl.constexpr, KEYS: tl.constexpr, HAS_HIDDEN: tl.constexpr,
):  # fmt: skip
    """Pairs of rows of KEYS biases, the second one what the dtype loses of the first.

    The first KEYS pairs hide the last 0, 1, ... keys of a tile. Then come N_TILES for every query
    block: log2 of a block's number of tokens, in units of `1 / unit`, where its mean stands for it.
    """
    row = tl.program_id(0)
    cols = tl.arange(0, KEYS)
    if row < KEYS:
        bias = tl.where(cols < KEYS - row, 0.0, -1e30)
        tl.store(bias_ptr + 2 * row * KEYS + cols, bias.to(bias_ptr.dtype.element_ty))
        lost = tl.zeros([KEYS], tl.float32).to(bias_ptr.dtype.element_ty)
        tl.store(bias_ptr + (2 * row + 1) * KEYS + cols, lost)
    else:
        row -= KEYS
        block = row % n_q_blocks
        head = (row // n_q_blocks) % n_heads
        batch = row // n_q_blocks // n_heads
        visited_ptr += batch.to(tl.int64) * visited_stride_b + head * visited_stride_h
        visited_ptr += block * n_k_blocks
        bias_ptr += (KEYS + row.to(tl.int64) * N_TILES) * 2 * KEYS
        for tile in range(N_TILES):
            number = tile * KEYS + cols
            unseen = tl.load(visited_ptr + number, mask=number < n_k_blocks, other=1) == 0
            if HAS_HIDDEN:
                at = hidden_ptr + batch * hidden_stride_b + number
                unseen = unseen & (tl.load(at, mask=unseen, other=1) == 0)
            start = tl.load(starts_ptr + number, mask=unseen, other=0)
            stop = tl.load(starts_ptr + number + 1, mask=unseen, other=1)
            bias = tl.math.log2((stop - start).to(tl.float32)) * unit
            bias = tl.where(unseen, bias, -1e30)
            coarse = bias.to(bias_ptr.dtype.element_ty)
            lost = tl.where(unseen, bias - coarse.to(tl.float32), 0.0)
            tl.store(bias_ptr + 2 * tile * KEYS + cols, coarse)
            tl.store(bias_ptr + (2 * tile + 1) * KEYS + cols, lost.to(bias_ptr.dtype.element_ty))
