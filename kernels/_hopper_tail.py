"""Listed blocks and a tail of block means in one loop, for Hopper. Launched by `tail.py`.

The loop has the shape that `_hopper.py` says is needed. Which keys of a tile count, and as how
many, is a bias of the scores that differs from tile to tile. It is added by a product of its own:
what feeds no product is fetched, and waited for, by the warps that multiply.
"""

import triton
import triton.language as tl

from dit_sparse.kernels._hopper import _forget_stale_barriers, _place


@triton.jit
def _first_row(starts_ptr, it, listed, first_mean, BLOCK_N: tl.constexpr):
    """Of a listed block or, behind the last one, of a tile of means."""
    start = tl.load(starts_ptr + it, mask=it < listed, other=0)
    return tl.where(it < listed, start, first_mean + (it - listed) * BLOCK_N)


@triton.jit
def _ones(dtype: tl.constexpr, ROWS: tl.constexpr):
    """What sums the two rows of a bias, its head and what 16 bits lose of it: `[ROWS, 16]`."""
    first = tl.arange(0, 16)[None, :] < 2
    return tl.where(first, 1.0, tl.zeros([ROWS, 16], tl.float32)).to(dtype)


@triton.jit(do_not_specialize=["n_outer", "first_inner"])  # compiled once for all of them
def _tail_fwd_hopper(
    q_ptr, k_desc, v_desc, bias_desc, out_ptr, lse_ptr, share_ptr, norm_ptr, longest_ptr,
    offsets_ptr, full_ptr, starts_ptr, lengths_ptr, q_starts_ptr, order_ptr,
    q_rows, q_cols, q_row_stride, q_row_b, q_row_h, q_col_h, k_rows_of_head,
    out_stride_b, out_stride_h, out_stride_n,
    list_stride_b, list_stride_h, order_stride_h,
    bias_stride_b, bias_stride_h,
    n_heads, n_q_blocks, n_outer, first_inner, n_queries, n_tiles, first_mean, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_ORDER: tl.constexpr, BOUND: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """The means are rows of k and v, from `first_mean` of each head on.

    Pairs of rows of biases: one for every number of keys that a listed block may lack, then
    `n_tiles` for each query block.

    SHARE: write which share of the softmax the means have.
    """
    block, head, batch = _place(n_q_blocks, n_outer, first_inner, n_heads)
    q_start = tl.load(q_starts_ptr + block)
    q_desc = tl.make_tensor_descriptor(
        q_ptr, shape=[q_rows, q_cols], strides=[q_row_stride, 1], block_shape=[BLOCK_M, BLOCK_D]
    )
    q_row = batch * q_row_b + head * q_row_h + q_start + _forget_stale_barriers()
    q = q_desc.load([q_row, head * q_col_h])

    row = batch * list_stride_b + head * list_stride_h + block
    first = tl.load(offsets_ptr + row)
    listed = tl.load(full_ptr + row)
    steps = listed + n_tiles
    bias_first = batch * bias_stride_b + head * bias_stride_h + block * n_tiles
    bias_first += BLOCK_N - listed
    starts_ptr += first
    lengths_ptr += first
    k_row = (batch * n_heads + head) * k_rows_of_head

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    alpha = tl.full([BLOCK_M], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    rows = q_start + tl.arange(0, BLOCK_M)
    if BOUND:  # scores cannot rise above it, and a mean's bias adds 7 at most
        norm_ptr += (batch.to(tl.int64) * n_heads + head) * n_queries
        m_i = tl.load(norm_ptr + rows, mask=rows < n_queries, other=0.0)
        m_i *= tl.load(longest_ptr + batch * n_heads + head) * scale_log2
    ones = _ones(bias_desc.dtype, BLOCK_M)
    of_means = tl.zeros([BLOCK_M], tl.float32)
    behind = tl.zeros([BLOCK_M, BLOCK_N], tl.int16)  # weights of the tile before, as bits

    for it in tl.range(0, steps, warp_specialize=True):
        lacking = BLOCK_N - tl.load(lengths_ptr + it, mask=it < listed, other=BLOCK_N)
        bias = bias_desc.load([2 * tl.where(it < listed, lacking, bias_first + it), 0])
        k = k_desc.load([k_row + _first_row(starts_ptr, it, listed, first_mean, BLOCK_N), 0])
        scores = tl.dot(ones, bias)
        scores = tl.dot(q, tl.trans(k), scores)
        before = tl.maximum(it - 1, 0)
        v = v_desc.load([k_row + _first_row(starts_ptr, before, listed, first_mean, BLOCK_N), 0])
        if not BOUND:
            acc = acc * alpha[:, None]
        acc = tl.dot(behind.to(v.dtype, bitcast=True), v, acc)
        if BOUND:
            p = tl.math.exp2(scores * scale_log2 - m_i[:, None])
            mass = tl.sum(p, 1)
            l_i += mass
            if SHARE:
                of_means += tl.where(it < listed, 0.0, mass)
        else:
            # Far above the scores of what does not count, so that it has no weight anywhere.
            m_new = tl.maximum(tl.maximum(m_i, tl.max(scores, 1) * scale_log2), -1e25)
            p = tl.math.exp2(scores * scale_log2 - m_new[:, None])
            alpha = tl.math.exp2(m_i - m_new)
            mass = tl.sum(p, 1)
            l_i = l_i * alpha + mass
            if SHARE:
                of_means = of_means * alpha + tl.where(it < listed, 0.0, mass)
            m_i = m_new
        behind = p.to(v.dtype).to(tl.int16, bitcast=True)

    last = tl.maximum(steps - 1, 0)
    v = v_desc.load([k_row + _first_row(starts_ptr, last, listed, first_mean, BLOCK_N), 0])
    if not BOUND:
        acc = acc * alpha[:, None]
    acc = tl.dot(behind.to(v.dtype, bitcast=True), v, acc)

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
    empty = l_i == 0.0
    l_safe = tl.where(empty, 1.0, l_i)
    acc = tl.where(empty[:, None], 0.0, acc / l_safe[:, None])  # a weight of 0 hides no NaN
    lse = tl.where(empty, float("-inf"), (m_i + tl.math.log2(l_safe)) * 0.6931471805599453)
    if BOUND:  # the same rule as in `_hopper.py`
        lse = tl.where(~(l_i >= 2.6e-26) & (steps > 0), float("inf"), lse)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=out_inside)
    tl.store(lse_ptrs, lse, mask=row_inside)
    if SHARE:
        share_ptr += (batch.to(tl.int64) * n_heads + head) * n_queries
        tl.store(share_ptr + tokens, of_means / l_safe, mask=row_inside)
