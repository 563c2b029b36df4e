"""Pooled entries added to the result for exact ones, for Hopper. Launched by `pooled.py`.

The loop has the shape that `_hopper.py` says is needed. Tiles are small, so that a block fills one
however much it is pooled; a step takes four, each with products of its own, since what a step waits
for would otherwise take longer than what it multiplies. One maximum and one sum serve all four:
Triton 3.6 does not specialise a loop with more.
"""

import triton
import triton.language as tl

from dit_sparse.kernels._hopper import _forget_stale_barriers, _place


@triton.jit
def _entry(entries_ptr, number, count):
    """One of `_pooled_tiles_fwd`; behind the last one that again, without tokens."""
    entry = tl.load(entries_ptr + tl.minimum(number, count - 1))
    return tl.where(number < count, entry, entry - (entry & 255))


@triton.jit
def _bias(entry, ROWS: tl.constexpr, LOG_SIZE: tl.constexpr, LOG_ROWS: tl.constexpr,
          RAGGED: tl.constexpr):  # fmt: skip
    """log2 of what the rows of a tile count as, -1e30 for nothing: of all rows, or of each."""
    left = entry & 255
    s = (entry >> 8) & 7
    whole = tl.minimum(s, LOG_SIZE - LOG_ROWS).to(tl.float32)
    bias = tl.where(left == 0, -1e30, whole)
    if RAGGED:
        copies = tl.maximum(s + LOG_ROWS - LOG_SIZE, 0)
        full = (left >> s) << copies
        rest = left - ((left >> s) << s)
        part = tl.math.log2(tl.maximum(rest, 1).to(tl.float32)) - copies.to(tl.float32)
        part = tl.where(rest == 0, -1e30, part)
        row = tl.arange(0, ROWS)
        behind = tl.where(row < full + (1 << copies), part, -1e30)
        bias = tl.where(row < full, whole, behind)[None, :]
    return bias


@triton.jit
def _weights(scores, bias, m_new, scale_log2, RAGGED: tl.constexpr):
    if RAGGED:
        weights = tl.math.exp2(scores * scale_log2 + bias - m_new[:, None])
    else:
        weights = tl.math.exp2(scores * scale_log2 - (m_new - bias)[:, None])
    return weights


@triton.jit
def _go_on(m_i, l_i, acc, lse_ptrs, out_ptrs, row_inside, out_inside):
    """Adds the result so far, as if it were one more key of the row."""
    before = tl.load(lse_ptrs, mask=row_inside, other=float("-inf"))
    before *= 1.4426950408889634
    m_new = tl.maximum(tl.maximum(m_i, before), -1e30)
    alpha = tl.math.exp2(m_i - m_new)
    weight = tl.math.exp2(before - m_new)
    acc = acc * alpha[:, None]
    acc += weight[:, None] * tl.load(out_ptrs, mask=out_inside, other=0.0).to(tl.float32)
    return m_new, l_i * alpha + weight, acc


@triton.jit(do_not_specialize=["n_outer", "first_inner"])
def _pooled_fwd_hopper(
    q_ptr, k_desc, v_desc, out_ptr, lse_ptr,
    offsets_ptr, counts_ptr, entries_ptr, q_starts_ptr, order_ptr,
    q_rows, q_cols, q_row_stride, q_row_b, q_row_h, q_col_h, k_rows_of_head,
    out_stride_b, out_stride_h, out_stride_n,
    list_stride_b, list_stride_h, order_stride_h,
    n_heads, n_q_blocks, n_outer, first_inner, n_queries, per_entry, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr,
    LOG_SIZE: tl.constexpr, LOG_ROWS: tl.constexpr,
    RAGGED: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Goes on from `out` and `lse`."""
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

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for it in tl.range(0, tl.cdiv(count, 4), warp_specialize=True):
        e0 = _entry(entries_ptr, 4 * it, count)
        e1 = _entry(entries_ptr, 4 * it + 1, count)
        e2 = _entry(entries_ptr, 4 * it + 2, count)
        e3 = _entry(entries_ptr, 4 * it + 3, count)
        k0 = k_desc.load([k_row + (e0 >> 11) * ROWS, 0])
        k1 = k_desc.load([k_row + (e1 >> 11) * ROWS, 0])
        k2 = k_desc.load([k_row + (e2 >> 11) * ROWS, 0])
        k3 = k_desc.load([k_row + (e3 >> 11) * ROWS, 0])
        b0 = _bias(e0, ROWS, LOG_SIZE, LOG_ROWS, RAGGED)
        b1 = _bias(e1, ROWS, LOG_SIZE, LOG_ROWS, RAGGED)
        b2 = _bias(e2, ROWS, LOG_SIZE, LOG_ROWS, RAGGED)
        b3 = _bias(e3, ROWS, LOG_SIZE, LOG_ROWS, RAGGED)
        s0 = tl.dot(q, tl.trans(k0))
        s1 = tl.dot(q, tl.trans(k1))
        s2 = tl.dot(q, tl.trans(k2))
        s3 = tl.dot(q, tl.trans(k3))
        # No row raises the maximum that has no weight: all repeat rows that have one. Weights reach
        # above 1 by what rows count.
        highest = tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3))
        m_new = tl.maximum(tl.maximum(m_i, tl.max(highest, 1) * scale_log2), -1e25)
        p0 = _weights(s0, b0, m_new, scale_log2, RAGGED)
        p1 = _weights(s1, b1, m_new, scale_log2, RAGGED)
        p2 = _weights(s2, b2, m_new, scale_log2, RAGGED)
        p3 = _weights(s3, b3, m_new, scale_log2, RAGGED)
        alpha = tl.math.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum((p0 + p1) + (p2 + p3), 1)
        v0 = v_desc.load([k_row + (e0 >> 11) * ROWS, 0])
        v1 = v_desc.load([k_row + (e1 >> 11) * ROWS, 0])
        v2 = v_desc.load([k_row + (e2 >> 11) * ROWS, 0])
        v3 = v_desc.load([k_row + (e3 >> 11) * ROWS, 0])
        acc = acc * alpha[:, None]
        acc = tl.dot(p0.to(v0.dtype), v0, acc)
        acc = tl.dot(p1.to(v1.dtype), v1, acc)
        acc = tl.dot(p2.to(v2.dtype), v2, acc)
        acc = tl.dot(p3.to(v3.dtype), v3, acc)
        m_i = m_new

    acc = tl.where((l_i == 0.0)[:, None], 0.0, acc)  # a weight of 0 hides no NaN
    rows = q_start + tl.arange(0, BLOCK_M)
    row_inside = rows < tl.load(q_starts_ptr + block + 1)
    tokens = rows.to(tl.int64)
    if HAS_ORDER:
        tokens = tl.load(order_ptr + head * order_stride_h + rows, mask=row_inside, other=0)
    cols = tl.arange(0, BLOCK_D)
    out_ptr += batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    out_ptrs = out_ptr + tokens[:, None] * out_stride_n + cols[None, :]
    out_inside = row_inside[:, None] & (cols[None, :] < D)
    lse_ptrs = lse_ptr + (batch.to(tl.int64) * n_heads + head) * n_queries + tokens
    m_i, l_i, acc = _go_on(m_i, l_i, acc, lse_ptrs, out_ptrs, row_inside, out_inside)
    empty = l_i == 0.0
    l_safe = tl.where(empty, 1.0, l_i)
    acc = acc / l_safe[:, None]
    lse = tl.where(empty, float("-inf"), (m_i + tl.math.log2(l_safe)) * 0.6931471805599453)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=out_inside)
    tl.store(lse_ptrs, lse, mask=row_inside)
