"""Block-sparse attention forward for Hopper with several query blocks to a program.

The loop of `_hopper.py`, for listed entries, inside one over query blocks: the producer
fetches the next block's queries and first keys while the consumers still write the result of the
last one. Queries have room for one block (`num_stages=1`), since a second one would not fit beside
two of keys and values. A kernel of its own, because either loop alone may be specialised.
"""

import triton
import triton.language as tl

from dit_sparse.kernels._hopper import _forget_stale_barriers, _placed, _queued


@triton.jit
def _bias(length, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of a block's columns: 0, and what no score outweighs for those behind its end."""
    within = tl.arange(0, BLOCK_N)
    if BLOCK_D > 64:  # where a select would take registers that are not there
        return tl.minimum((length - 1 - within).to(tl.float32), 0.0) * 1e30
    return tl.where(within < length, 0.0, float("-inf"))


@triton.jit(do_not_specialize=["n_tiles", "n_each", "n_outer", "first_inner"])
def _block_sparse_fwd_hopper_persistent(
    q_ptr, k_desc, v_desc, classes_ptr, hidden_desc, out_ptr, lse_ptr,
    norm_ptr, longest_ptr,
    offsets_ptr, full_ptr, partial_ptr, starts_ptr, lengths_ptr, class_ptr, pattern_ptr,
    q_starts_ptr, order_ptr, queue_ptr,
    q_rows, q_cols, q_row_stride, q_row_b, q_row_h, q_col_h,
    k_row_b, k_row_h, k_col_h,
    v_row_b, v_row_h, v_col_h,
    out_stride_b, out_stride_h, out_stride_n,
    list_stride_b, list_stride_h, order_stride_h, class_stride_h,
    n_tiles, n_each, n_heads, group, n_q_blocks, n_outer, first_inner, n_queries,
    n_classes, scale_log2, floor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RAGGED: tl.constexpr, HAS_ORDER: tl.constexpr, COLUMNS: tl.constexpr, BOUND: tl.constexpr,
    QUEUED: tl.constexpr,
):  # fmt: skip
    q_desc = tl.make_tensor_descriptor(
        q_ptr, shape=[q_rows, q_cols], strides=[q_row_stride, 1], block_shape=[BLOCK_M, BLOCK_D]
    )
    if COLUMNS:
        classes_desc = tl.make_tensor_descriptor(
            classes_ptr, shape=[n_classes, COLUMNS], strides=[COLUMNS, 1],
            block_shape=[BLOCK_M, COLUMNS],
        )  # fmt: skip
    # As many as there are blocks around the picture, which read everything, have a program each,
    # the first ones.
    outer = n_tiles // n_q_blocks * n_outer
    q_row_h += _forget_stale_barriers()
    pid = tl.program_id(0)
    begin = tl.where(pid < outer, pid, outer + (pid - outer) * n_each)
    end = tl.minimum(begin + tl.where(pid < outer, 1, n_each), n_tiles)
    for tile in tl.range(begin, end, num_stages=1, warp_specialize=True):
        if QUEUED:
            block, head, batch = _queued(queue_ptr, tile, n_q_blocks, n_heads)
        else:
            block, head, batch = _placed(tile, n_tiles, n_q_blocks, n_outer, first_inner, n_heads)
        q_start = tl.load(q_starts_ptr + block)
        q = q_desc.load([batch * q_row_b + head * q_row_h + q_start, head * q_col_h])

        if COLUMNS:
            number = tl.load(class_ptr + head * class_stride_h + block)
            classes = classes_desc.load([number * BLOCK_M, 0])

        row = batch * list_stride_b + head * list_stride_h + block
        first = tl.load(offsets_ptr + row)
        steps = tl.load(full_ptr + row)
        if COLUMNS:  # masked or not, all entries stand in one list
            steps += tl.load(partial_ptr + row)
        patterns = pattern_ptr + first
        starts = starts_ptr + first
        lengths = lengths_ptr + first
        k_head = head // group  # as many heads of q share one of k and v
        k_row = batch * k_row_b + k_head * k_row_h
        v_row = batch * v_row_b + k_head * v_row_h
        k_col = k_head * k_col_h
        v_col = k_head * v_col_h

        m_i = tl.full([BLOCK_M], floor, tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        alpha = tl.full([BLOCK_M], 1.0, tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        rows = q_start + tl.arange(0, BLOCK_M)
        if BOUND:  # scores cannot rise above it, so no running maximum is needed
            norms = norm_ptr + (batch.to(tl.int64) * n_heads + head) * n_queries
            m_i = tl.load(norms + rows, mask=rows < n_queries, other=0.0)
            m_i *= tl.load(longest_ptr + batch * n_heads + head) * scale_log2
        # The weights of the block before, as bits: a loop-carried bfloat16 tile would be sent
        # through shared memory, and the product with it waited for.
        behind = tl.zeros([BLOCK_M, BLOCK_N], tl.int16)

        for it in tl.range(0, steps, num_stages=2):
            k = k_desc.load([k_row + tl.load(starts + it), k_col])
            if RAGGED:
                length = tl.load(lengths + it)
            if COLUMNS:
                hidden = hidden_desc.load([tl.load(patterns + it) * BLOCK_N, 0])
                scores = tl.dot(q, tl.trans(k), tl.dot(classes, tl.trans(hidden)))
            else:
                scores = tl.dot(q, tl.trans(k))
            v = v_desc.load([v_row + tl.load(starts + tl.maximum(it - 1, 0)), v_col])
            if not BOUND:
                acc = acc * alpha[:, None]
            acc = tl.dot(behind.to(v.dtype, bitcast=True), v, acc)
            if RAGGED:
                bias = _bias(length, BLOCK_N, BLOCK_D)
            if BOUND:
                shift = -m_i[:, None]
                if RAGGED:
                    shift += bias[None, :]
                p = tl.math.exp2(scores * scale_log2 + shift)
                l_i += tl.sum(p, 1)
            else:
                if RAGGED:  # a column bias rides on the scaling, a select would not
                    scores = scores * scale_log2 + bias[None, :]
                    m_new = tl.maximum(tl.maximum(m_i, tl.max(scores, 1)), -1e30)
                    p = tl.math.exp2(scores - m_new[:, None])
                else:
                    m_new = tl.maximum(m_i, tl.max(scores, 1) * scale_log2)
                    p = tl.math.exp2(scores * scale_log2 - m_new[:, None])
                alpha = tl.math.exp2(m_i - m_new)
                l_i = l_i * alpha + tl.sum(p, 1)
                m_i = m_new
            behind = p.to(v.dtype).to(tl.int16, bitcast=True)

        v_start = tl.load(starts + tl.maximum(steps - 1, 0), mask=steps > 0, other=0)
        v = v_desc.load([v_row + v_start, v_col])
        if not BOUND:
            acc = acc * alpha[:, None]
        acc = tl.dot(behind.to(v.dtype, bitcast=True), v, acc)
        acc = tl.where((l_i == 0.0)[:, None], 0.0, acc)  # a weight of 0 hides no NaN

        row_inside = rows < tl.load(q_starts_ptr + block + 1)
        tokens = rows.to(tl.int64)
        if HAS_ORDER:
            tokens = tl.load(order_ptr + head * order_stride_h + rows, mask=row_inside, other=0)
        cols = tl.arange(0, BLOCK_D)
        outs = out_ptr + batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
        outs = outs + tokens[:, None] * out_stride_n + cols[None, :]
        lses = lse_ptr + (batch.to(tl.int64) * n_heads + head) * n_queries + tokens
        empty = l_i == 0.0
        l_safe = tl.where(empty, 1.0, l_i)
        acc = acc / l_safe[:, None]
        lse = tl.where(empty, float("-inf"), (m_i + tl.math.log2(l_safe)) * 0.6931471805599453)
        if BOUND:
            # As in `_hopper.py`: too little is left of the weights, or they are no numbers.
            lse = tl.where(~(l_i >= 2.6e-26) & (steps > 0), float("inf"), lse)
        out_inside = row_inside[:, None] & (cols[None, :] < D)
        tl.store(outs, acc.to(out_ptr.dtype.element_ty), mask=out_inside)
        tl.store(lses, lse, mask=row_inside)
