"""A tail of block means, added to attention over listed blocks. Launched by `tail.py`."""

import triton
import triton.language as tl


@triton.jit
def _tail_bias_fwd(
    visited_ptr, hidden_ptr, starts_ptr, bias_ptr,
    visited_stride_b, visited_stride_h, hidden_stride_b, n_heads, n_q_blocks, n_k_blocks, width,
    HAS_HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """log2 of the tokens that each mean stands for in a row of a plan; -inf for all other blocks,
    and behind the last one up to `width`.

    Made before the loop that reads it: bytes are not fetched ahead there, and were waited for in
    every step.
    """
    row = tl.program_id(0)
    block = row % n_q_blocks
    head = (row // n_q_blocks) % n_heads
    batch = row // n_q_blocks // n_heads
    visited_ptr += batch.to(tl.int64) * visited_stride_b + head.to(tl.int64) * visited_stride_h
    visited_ptr += block * n_k_blocks
    hidden_ptr += batch * hidden_stride_b
    bias_ptr += row.to(tl.int64) * width
    for first in range(0, width, BLOCK):
        number = first + tl.arange(0, BLOCK)
        inside = number < n_k_blocks
        unseen = inside & (tl.load(visited_ptr + number, mask=inside, other=1) == 0)
        if HAS_HIDDEN:
            unseen = unseen & (tl.load(hidden_ptr + number, mask=inside, other=1) == 0)
        start = tl.load(starts_ptr + number, mask=inside, other=0)
        stop = tl.load(starts_ptr + number + 1, mask=inside, other=1)
        bias = tl.where(unseen, tl.math.log2((stop - start).to(tl.float32)), float("-inf"))
        tl.store(bias_ptr + number, bias, mask=number < width)


@triton.jit
def _tail_fwd(
    q_ptr, means_desc, bias_desc, slope_desc, out_ptr, lse_ptr, q_starts_ptr, order_ptr,
    q_stride_b, q_stride_h, q_stride_n, out_stride_b, out_stride_h, out_stride_n,
    order_stride_h, bias_row_b, bias_row_h,
    n_pairs, n_heads, n_q_blocks, n_k_blocks, n_queries, scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_ORDER: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """Goes on from `out` and `lse` as if they were one key of each row.

    Queries are in plan order, results in the caller's. Means of k and then of v are `[B H, n, D]`
    each, biases rows as `_tail_bias_fwd` makes them. All that the loop reads comes through
    descriptors, several steps ahead. SLOPE: add `share * scale * q @ slope`, the share being that
    of the means.
    """
    pid = tl.program_id(0)
    block = pid % n_q_blocks
    pair = pid // n_q_blocks
    head = pair % n_heads
    batch = pair // n_heads
    rows = tl.load(q_starts_ptr + block) + tl.arange(0, BLOCK_M)
    row_inside = rows < tl.load(q_starts_ptr + block + 1)
    tokens = rows.to(tl.int64)
    if HAS_ORDER:
        tokens = tl.load(order_ptr + head * order_stride_h + rows, mask=row_inside, other=0)
    cols = tl.arange(0, BLOCK_D)
    inside = row_inside[:, None] & (cols < D)[None, :]
    q_ptr += batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    q_rows = rows.to(tl.int64)[:, None] * q_stride_n
    q = tl.load(q_ptr + q_rows + cols[None, :], mask=inside, other=0.0)
    out_ptr += batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    out_ptrs = out_ptr + tokens[:, None] * out_stride_n + cols[None, :]
    lse_ptr += pair.to(tl.int64) * n_queries
    before = tl.load(lse_ptr + tokens, mask=row_inside, other=float("-inf")) * 1.4426950408889634
    l_i = tl.where(before == float("-inf"), 0.0, 1.0)
    # Finite in a row that has seen no key yet, so that no NaN arises.
    before = tl.maximum(before, -1e30)
    m_i = before
    acc = tl.load(out_ptrs, mask=inside, other=0.0).to(tl.float32)

    bias_row = batch * bias_row_b + head * bias_row_h + block
    for first in range(0, n_k_blocks, BLOCK_N):
        k = means_desc.load([pair, first, 0]).reshape(BLOCK_N, BLOCK_D)
        bias = bias_desc.load([bias_row, first])
        v = means_desc.load([n_pairs + pair, first, 0]).reshape(BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 + bias
        m_new = tl.maximum(m_i, tl.max(scores, 1))
        p = tl.math.exp2(scores - m_new[:, None])
        alpha = tl.math.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m_i = m_new

    empty = l_i == 0.0
    l_safe = tl.where(empty, 1.0, l_i)
    if SLOPE:
        # What the sums have gained since. It weighs the product, which begins with all the rest
        # divided by it: there are no registers for a sum of its own. A share below the least
        # changes nothing.
        share = tl.maximum(1.0 - tl.math.exp2(before - m_i) / l_safe, 0.0) * scale
        share = tl.where(tl.abs(share) < 1e-12, 1e-12, share)
        slope = slope_desc.load([pair, 0, 0]).reshape(BLOCK_D, BLOCK_D)
        acc = tl.dot(q, slope, acc / (l_safe * share)[:, None], input_precision="ieee")
        acc = acc * share[:, None]
    else:
        acc = acc / l_safe[:, None]
    acc = tl.where(empty[:, None], 0.0, acc)  # a weight of 0 hides no NaN
    lse = tl.where(empty, float("-inf"), (m_i + tl.math.log2(l_safe)) * 0.6931471805599453)
    if HAS_ORDER:  # read again rather than held in registers through the loop
        tokens = tl.load(order_ptr + head * order_stride_h + rows, mask=row_inside, other=0)
    out_ptrs = out_ptr + tokens[:, None] * out_stride_n + cols[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + tokens, lse, mask=row_inside)
