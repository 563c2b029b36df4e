"""A tail of block means, added to attention over listed blocks. Launched by `tail.py`."""

import triton
import triton.language as tl


@triton.jit
def _bias(visited_ptr, hidden_ptr, starts_ptr, number, n_k_blocks, HAS_HIDDEN: tl.constexpr):
    """log2 of the tokens of each block that its mean stands for; -inf for all other blocks."""
    inside = number < n_k_blocks
    unseen = inside & (tl.load(visited_ptr + number, mask=inside, other=1) == 0)
    if HAS_HIDDEN:
        unseen = unseen & (tl.load(hidden_ptr + number, mask=inside, other=1) == 0)
    start = tl.load(starts_ptr + number, mask=inside, other=0)
    stop = tl.load(starts_ptr + number + 1, mask=inside, other=1)
    return tl.where(unseen, tl.math.log2((stop - start).to(tl.float32)), float("-inf"))


@triton.jit
def _tail_fwd(
    q_ptr, means_desc, slope_ptr, out_ptr, lse_ptr,
    visited_ptr, hidden_ptr, starts_ptr, q_starts_ptr, order_ptr,
    q_stride_b, q_stride_h, q_stride_n, out_stride_b, out_stride_h, out_stride_n,
    visited_stride_b, visited_stride_h, hidden_stride_b, order_stride_h,
    n_pairs, n_heads, n_q_blocks, n_k_blocks, n_queries, scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_HIDDEN: tl.constexpr, HAS_ORDER: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """Goes on from `out` and `lse` as if they were one key of each row.

    Queries are in plan order, results in the caller's. Means of k and then of v are `[B H, n, D]`
    each. SLOPE: add `share * scale * q @ slope`, the share being that of the means.
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
    m_i = tl.load(lse_ptr + tokens, mask=row_inside, other=float("-inf")) * 1.4426950408889634
    l_i = tl.where(m_i == float("-inf"), 0.0, 1.0)
    acc = tl.load(out_ptrs, mask=inside, other=0.0).to(tl.float32)
    share = tl.zeros([BLOCK_M], tl.float32)

    visited_ptr += batch.to(tl.int64) * visited_stride_b + head.to(tl.int64) * visited_stride_h
    visited_ptr += block * n_k_blocks
    hidden_ptr += batch * hidden_stride_b
    for first in range(0, n_k_blocks, BLOCK_N):
        number = first + tl.arange(0, BLOCK_N)
        k = means_desc.load([pair, first, 0]).reshape(BLOCK_N, BLOCK_D)
        v = means_desc.load([n_pairs + pair, first, 0]).reshape(BLOCK_N, BLOCK_D)
        bias = _bias(visited_ptr, hidden_ptr, starts_ptr, number, n_k_blocks, HAS_HIDDEN)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 + bias[None, :]
        m_new = tl.maximum(m_i, tl.max(scores, 1))
        # A row that has seen no key yet keeps -inf; 0 stands in for it so that no NaN arises.
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.math.exp2(scores - m_safe[:, None])
        alpha = tl.math.exp2(m_i - m_safe)
        mass = tl.sum(p, 1)
        l_i = l_i * alpha + mass
        share = share * alpha + mass
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m_i = m_new

    empty = l_i == 0.0
    l_safe = tl.where(empty, 1.0, l_i)
    acc = acc / l_safe[:, None]
    if SLOPE:
        share = share / l_safe
        # The share is at most 1, so that what it is multiplied by fits a 16-bit query.
        q_rows = (tl.load(q_starts_ptr + block) + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        q = tl.load(q_ptr + q_rows * q_stride_n + cols[None, :], mask=inside, other=0.0)
        weighted = q.to(tl.float32) * (share * scale)[:, None]
        depth = tl.arange(0, BLOCK_D)
        matrix = slope_ptr + pair.to(tl.int64) * (D * D) + depth[:, None] * D + cols[None, :]
        slope = tl.load(matrix, mask=(depth < D)[:, None] & (cols < D)[None, :], other=0.0)
        acc = tl.dot(weighted.to(slope.dtype), slope, acc, input_precision="ieee")
    acc = tl.where(empty[:, None], 0.0, acc)  # a weight of 0 hides no NaN
    lse = tl.where(empty, float("-inf"), (m_i + tl.math.log2(l_safe)) * 0.6931471805599453)
    if HAS_ORDER:  # read again rather than held in registers through the loop
        tokens = tl.load(order_ptr + head * order_stride_h + rows, mask=row_inside, other=0)
    out_ptrs = out_ptr + tokens[:, None] * out_stride_n + cols[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + tokens, lse, mask=row_inside)
