"""Pooled entries added to the result for exact ones, for Hopper. Launched by `pooled.py`.

The loop has the shape that `_hopper.py` says is needed. Tiles are small, so that a block fills one
however much it is pooled; a step takes four, each with products of its own, since what a step waits
for would otherwise take longer than what it multiplies. One maximum and one sum serve all four:
Triton 3.6 does not specialise a loop with more. Products with so few keys would read queries from
shared memory more often than it can give them, so they are held in registers where there is room.
"""

import triton
import triton.language as tl

from dit_sparse.kernels._hopper import _forget_stale_barriers, _place


@triton.jit
def _entry(entries_ptr, number, count):
    """One of `_pooled_tiles_fwd`; behind the last one that again, without tokens; of none 0."""
    entry = tl.load(entries_ptr + tl.minimum(number, count - 1), mask=count > 0, other=0)
    return tl.where(number < count, entry, entry - (entry & 255))


@triton.jit
def _bias(entry, LOG_SIZE: tl.constexpr, LOG_ROWS: tl.constexpr):
    """log2 of the tokens that a row of a tile stands for."""
    return tl.minimum((entry >> 8) & 7, LOG_SIZE - LOG_ROWS).to(tl.float32)


@triton.jit
def _share(entry, bias, ROWS: tl.constexpr):
    """How much of every row has tokens: in a short block the last ones have none. Rows that repeat
    a group get its tokens one after the other, which is all the same in their sum."""
    full = (entry & 255).to(tl.float32) * tl.math.exp2(-bias)
    return tl.minimum(tl.maximum(full - tl.arange(0, ROWS).to(tl.float32), 0.0), 1.0)


@triton.jit
def _weights(scores, entry, m_new, scale_log2, ROWS: tl.constexpr, LOG_SIZE: tl.constexpr,
             LOG_ROWS: tl.constexpr, RAGGED: tl.constexpr):  # fmt: skip
    bias = _bias(entry, LOG_SIZE, LOG_ROWS)
    if RAGGED:
        weights = tl.math.exp2(scores * scale_log2 - (m_new - bias)[:, None])
        weights *= _share(entry, bias, ROWS)[None, :]
    else:
        bias = tl.where((entry & 255) == 0, -1e30, bias)
        weights = tl.math.exp2(scores * scale_log2 - (m_new - bias)[:, None])
    return weights


@triton.jit
def _bits(weights, v):
    """A loop-carried tile of another type would be sent through shared memory."""
    return weights.to(v.dtype).to(tl.int16, bitcast=True)


@triton.jit
def _add(acc, bits, v):
    return tl.dot(bits.to(v.dtype, bitcast=True), v, acc)


@triton.jit
def _in_registers(q, zero):
    """The same numbers, of which the compiler does not know that they are those it has loaded: it
    would multiply them from where they lie in shared memory."""
    return (q.to(tl.int16, bitcast=True) ^ zero.to(tl.int16)).to(q.dtype, bitcast=True)


@triton.jit
def _trusted(l_i, bound, before):
    """Whether sums in units of the bound are what they should be. What fell below the least number
    is too little to count where so much is left, or where the row has so much already. A mean that
    was rounded up may be above the bound. No number is not to be trusted."""
    return ((l_i >= 2.6e-26) | (before >= bound - 64.0)) & (l_i <= 1e18)


@triton.jit
def _go_on(m_i, l_i, acc, before, out_ptrs, out_inside):
    """Adds the result so far, as if it were one more key of the row."""
    m_new = tl.maximum(tl.maximum(m_i, before), -1e30)
    alpha = tl.math.exp2(m_i - m_new)
    weight = tl.math.exp2(before - m_new)
    acc = acc * alpha[:, None]
    acc += weight[:, None] * tl.load(out_ptrs, mask=out_inside, other=0.0).to(tl.float32)
    return m_new, l_i * alpha + weight, acc


@triton.jit(do_not_specialize=["n_outer", "first_inner"])
def _pooled_fwd_hopper(
    q_ptr, k_desc, v_desc, out_ptr, lse_ptr, norm_ptr, longest_ptr, again_ptr,
    offsets_ptr, counts_ptr, entries_ptr, q_starts_ptr, order_ptr,
    q_rows, q_cols, q_row_stride, q_row_b, q_row_h, q_col_h, k_rows_of_head,
    out_stride_b, out_stride_h, out_stride_n,
    list_stride_b, list_stride_h, order_stride_h,
    n_heads, n_q_blocks, n_outer, first_inner, n_queries, per_entry, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr,
    LOG_SIZE: tl.constexpr, LOG_ROWS: tl.constexpr,
    RAGGED: tl.constexpr, HAS_ORDER: tl.constexpr, HELD: tl.constexpr,
    BOUND: tl.constexpr,
):  # fmt: skip
    """Goes on from `out` and `lse`.

    HELD: whether queries are multiplied from registers.
    BOUND: whether bounds of the scores are subtracted in the place of maxima. Rows that they fail
    are left as they are and marked in `again`.
    """
    block, head, batch = _place(n_q_blocks, n_outer, first_inner, n_heads)
    q_start = tl.load(q_starts_ptr + block)
    q_desc = tl.make_tensor_descriptor(
        q_ptr, shape=[q_rows, q_cols], strides=[q_row_stride, 1], block_shape=[BLOCK_M, BLOCK_D]
    )
    q_row = batch * q_row_b + head * q_row_h + q_start + _forget_stale_barriers()
    q = q_desc.load([q_row, head * q_col_h])
    row = batch * list_stride_b + head * list_stride_h + block
    count = tl.load(counts_ptr + row)
    entries_ptr += tl.load(offsets_ptr + row).to(tl.int64) * per_entry
    k_row = (batch * n_heads + head) * k_rows_of_head

    if HELD:
        q = _in_registers(q, count < 0)
    m_i = tl.full([BLOCK_M], -1e25, tl.float32)
    rows = q_start + tl.arange(0, BLOCK_M)
    pair = batch.to(tl.int64) * n_heads + head
    if BOUND:  # no mean is longer than the longest key
        m_i = tl.load(norm_ptr + pair * n_queries + rows, mask=rows < n_queries, other=0.0)
        m_i *= tl.load(longest_ptr + pair) * scale_log2
    l_i = tl.zeros([BLOCK_M], tl.float32)
    alpha = tl.full([BLOCK_M], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Weights of the step before.
    w0 = tl.zeros([BLOCK_M, ROWS], tl.int16)
    w1 = tl.zeros([BLOCK_M, ROWS], tl.int16)
    w2 = tl.zeros([BLOCK_M, ROWS], tl.int16)
    w3 = tl.zeros([BLOCK_M, ROWS], tl.int16)
    steps = tl.cdiv(count, 4)
    for it in tl.range(0, steps, warp_specialize=True):
        e0 = _entry(entries_ptr, 4 * it, count)
        e1 = _entry(entries_ptr, 4 * it + 1, count)
        e2 = _entry(entries_ptr, 4 * it + 2, count)
        e3 = _entry(entries_ptr, 4 * it + 3, count)
        k0 = k_desc.load([k_row + (e0 >> 11) * ROWS, 0])
        k1 = k_desc.load([k_row + (e1 >> 11) * ROWS, 0])
        k2 = k_desc.load([k_row + (e2 >> 11) * ROWS, 0])
        k3 = k_desc.load([k_row + (e3 >> 11) * ROWS, 0])
        s0 = tl.dot(q, tl.trans(k0))
        s1 = tl.dot(q, tl.trans(k1))
        s2 = tl.dot(q, tl.trans(k2))
        s3 = tl.dot(q, tl.trans(k3))
        behind = 4 * tl.maximum(it - 1, 0)
        v0 = v_desc.load([k_row + (_entry(entries_ptr, behind, count) >> 11) * ROWS, 0])
        v1 = v_desc.load([k_row + (_entry(entries_ptr, behind + 1, count) >> 11) * ROWS, 0])
        v2 = v_desc.load([k_row + (_entry(entries_ptr, behind + 2, count) >> 11) * ROWS, 0])
        v3 = v_desc.load([k_row + (_entry(entries_ptr, behind + 3, count) >> 11) * ROWS, 0])
        if not BOUND:
            acc = acc * alpha[:, None]
        acc = _add(acc, w0, v0)
        acc = _add(acc, w1, v1)
        acc = _add(acc, w2, v2)
        acc = _add(acc, w3, v3)
        m_new = m_i
        if not BOUND:
            # No row raises the maximum that has no weight: all repeat rows that have one. Weights
            # reach above 1 by what rows count.
            highest = tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3))
            m_new = tl.maximum(m_i, tl.max(highest, 1) * scale_log2)
        p0 = _weights(s0, e0, m_new, scale_log2, ROWS, LOG_SIZE, LOG_ROWS, RAGGED)
        p1 = _weights(s1, e1, m_new, scale_log2, ROWS, LOG_SIZE, LOG_ROWS, RAGGED)
        p2 = _weights(s2, e2, m_new, scale_log2, ROWS, LOG_SIZE, LOG_ROWS, RAGGED)
        p3 = _weights(s3, e3, m_new, scale_log2, ROWS, LOG_SIZE, LOG_ROWS, RAGGED)
        if not BOUND:
            alpha = tl.math.exp2(m_i - m_new)
            l_i = l_i * alpha
            m_i = m_new
        l_i += tl.sum((p0 + p1) + (p2 + p3), 1)
        w0 = _bits(p0, v0)
        w1 = _bits(p1, v1)
        w2 = _bits(p2, v2)
        w3 = _bits(p3, v3)

    last = 4 * tl.maximum(steps - 1, 0)
    v0 = v_desc.load([k_row + (_entry(entries_ptr, last, count) >> 11) * ROWS, 0])
    v1 = v_desc.load([k_row + (_entry(entries_ptr, last + 1, count) >> 11) * ROWS, 0])
    v2 = v_desc.load([k_row + (_entry(entries_ptr, last + 2, count) >> 11) * ROWS, 0])
    v3 = v_desc.load([k_row + (_entry(entries_ptr, last + 3, count) >> 11) * ROWS, 0])
    if not BOUND:
        acc = acc * alpha[:, None]
    acc = _add(acc, w0, v0)
    acc = _add(acc, w1, v1)
    acc = _add(acc, w2, v2)
    acc = _add(acc, w3, v3)
    acc = tl.where((l_i == 0.0)[:, None], 0.0, acc)  # a weight of 0 hides no NaN
    rows = q_start + tl.arange(0, BLOCK_M)
    # Nothing is added to rows that list nothing.
    row_inside = rows < tl.where(count > 0, tl.load(q_starts_ptr + block + 1), 0)
    tokens = rows.to(tl.int64)
    if HAS_ORDER:
        tokens = tl.load(order_ptr + head * order_stride_h + rows, mask=row_inside, other=0)
    lse_ptrs = lse_ptr + pair * n_queries + tokens
    before = tl.load(lse_ptrs, mask=row_inside, other=float("-inf")) * 1.4426950408889634
    cols = tl.arange(0, BLOCK_D)
    out_ptr += batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    out_ptrs = out_ptr + tokens[:, None] * out_stride_n + cols[None, :]
    out_inside = row_inside[:, None] & (cols[None, :] < D)
    trusted = _trusted(l_i, m_i, before)
    m_i, l_i, acc = _go_on(m_i, l_i, acc, before, out_ptrs, out_inside)
    empty = l_i == 0.0
    l_safe = tl.where(empty, 1.0, l_i)
    acc = acc / l_safe[:, None]
    lse = tl.where(empty, float("-inf"), (m_i + tl.math.log2(l_safe)) * 0.6931471805599453)
    if BOUND:
        again = tl.where(trusted | (count == 0), 0, 1).to(tl.int8)
        of_block = rows < tl.load(q_starts_ptr + block + 1)
        tl.store(again_ptr + pair * n_queries + rows, again, mask=of_block)
        row_inside = row_inside & trusted
        out_inside = row_inside[:, None] & (cols[None, :] < D)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=out_inside)
    tl.store(lse_ptrs, lse, mask=row_inside)
