"""Block-sparse attention forward for any GPU, list-driven. Launched by `portable.py`."""

import triton
import triton.language as tl


@triton.jit
def _load_tile(ptr, desc, batch, head, start, stride_b, stride_h, stride_n, n_keys,
               D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
               TMA: tl.constexpr):  # fmt: skip
    """Rows `start .. start + BLOCK_N` of one head, zero past the end of the sequence."""
    if TMA:
        tile = desc.load([batch, head, start, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        rows = start + tl.arange(0, BLOCK_N)
        cols = tl.arange(0, BLOCK_D)
        base = ptr + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
        ptrs = base + rows.to(tl.int64)[:, None] * stride_n + cols[None, :]
        inside = rows[:, None] < n_keys
        if D != BLOCK_D:
            inside = inside & (cols[None, :] < D)
        tile = tl.load(ptrs, mask=inside, other=0.0)
    return tile


@triton.jit
def _column_bias(within, length, bias_ptr, HAS_BIAS: tl.constexpr):
    """Of each column: the bias of its entry, as a power of 2, and -inf behind the block's end."""
    bias = tl.where(within < length, 0.0, float("-inf"))
    if HAS_BIAS:
        bias += tl.load(bias_ptr) * 1.4426950408889634
    return bias


@triton.jit
def _shown(words_ptr, key):
    """Which keys of a block the bits of its words show."""
    word = tl.load(words_ptr + key // 32)
    return (((word >> (key % 32)) & 1) != 0)[None, :]


@triton.jit
def _inside(above, below, lower, upper, guard, DISK: tl.constexpr):
    """Which keys are inside the disks or boxes of the queries."""
    if DISK:
        dy = (above >> 16)[None, :] - (lower >> 16)[:, None]
        dx = (above & 0xFFFF)[None, :] - (lower & 0xFFFF)[:, None]
        return (dy * dy + dx * dx < upper[:, None]) | (above < 0)[None, :]
    inside = (above[None, :] - lower[:, None]) & (upper[:, None] - below[None, :])
    return (inside & guard) == guard


@triton.jit
def _accumulate(acc, l_i, alpha, p, v):
    """One step of the online softmax: rescale by alpha, add the values that p weighs."""
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, l_i


@triton.jit
def _accumulate_full(m_i, l_i, acc, scores, v, scale_log2, SCALED: tl.constexpr):
    """`_accumulate` of scores of which every row has some, times `scale_log2` already or not."""
    if SCALED:
        m_new = tl.maximum(m_i, tl.max(scores, 1))
        p = tl.math.exp2(scores - m_new[:, None])
    else:
        m_new = tl.maximum(m_i, tl.max(scores, 1) * scale_log2)
        p = tl.math.exp2(scores * scale_log2 - m_new[:, None])
    acc, l_i = _accumulate(acc, l_i, tl.math.exp2(m_i - m_new), p, v)
    return m_new, l_i, acc


@triton.jit
def _accumulate_masked(m_i, l_i, acc, scores, v):
    """`_accumulate` of scores of which a row may have none above -inf."""
    m_new = tl.maximum(m_i, tl.max(scores, 1))
    # A row that has seen no key yet keeps -inf; 0 stands in for it so that no NaN arises.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.math.exp2(scores - m_safe[:, None])
    acc, l_i = _accumulate(acc, l_i, tl.math.exp2(m_i - m_safe), p, v)
    return m_new, l_i, acc


@triton.jit
def _results(ptr, tokens, cols, row_inside, stride_n, DV: tl.constexpr):
    """Where rows of results stand, and which columns of which rows do."""
    inside = row_inside[:, None] & (cols[None, :] < DV)
    return ptr + tokens[:, None] * stride_n + cols[None, :], inside


@triton.jit
def _divided(m_i, l_i, acc):
    """Rows of the result and their LSE; 0 and -inf for empty ones."""
    empty = l_i == 0.0
    l_safe = tl.where(empty, 1.0, l_i)
    acc = tl.where(empty[:, None], 0.0, acc / l_safe[:, None])  # no weight of 0 hides a NaN
    lse = tl.where(empty, float("-inf"), (m_i + tl.math.log2(l_safe)) * 0.6931471805599453)
    return acc, lse


@triton.jit
def _portable_fwd(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, out_ptr, lse_ptr,
    offsets_ptr, full_ptr, partial_ptr, starts_ptr, lengths_ptr, q_starts_ptr, order_ptr,
    queue_ptr, lower_ptr, upper_ptr, above_ptr, below_ptr, words_ptr, bias_ptr,
    q_stride_b, q_stride_h, q_stride_n,
    k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n,
    out_stride_b, out_stride_h, out_stride_n,
    list_stride_b, list_stride_h, order_stride_h, box_stride_h,
    n_heads, group, n_q_blocks, n_queries, n_keys, scale_log2, guard,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, SUB: tl.constexpr,
    FULL: tl.constexpr, ADD: tl.constexpr, RAGGED: tl.constexpr, HAS_BOX: tl.constexpr,
    DISK: tl.constexpr, HAS_WORDS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr,
    TMA: tl.constexpr, REPAIR: tl.constexpr, QUEUED: tl.constexpr,
):  # fmt: skip
    # Query blocks of one head are neighbours in the launch order and walk the same keys in L2.
    pid = tl.program_id(0) // PARTS
    if QUEUED:
        pid = tl.load(queue_ptr + pid)
    block = pid % n_q_blocks
    head = (pid // n_q_blocks) % n_heads
    batch = pid // n_q_blocks // n_heads
    k_head = head // group  # as many heads of q share one of k and v

    row = batch * list_stride_b + head * list_stride_h + block
    n_partial = 0
    if HAS_BOX:
        n_partial = tl.load(partial_ptr + row)
    if ADD:
        # Another kernel has done the other entries: some rows have no more than those.
        n_added = n_partial
        if FULL:
            n_added += tl.load(full_ptr + row)
        if n_added == 0:
            return

    first_row = tl.load(q_starts_ptr + block) + tl.program_id(0) % PARTS * BLOCK_M
    end_row = tl.load(q_starts_ptr + block + 1)
    if PARTS > 1:  # noqa: SIM102
        if first_row >= end_row:  # a short block has fewer
            return
    rows = first_row + tl.arange(0, BLOCK_M)
    row_inside = rows < end_row
    order_ptr += head * order_stride_h
    tokens = rows.to(tl.int64)
    if HAS_ORDER:  # queries are read from, and results written to, the caller's order
        tokens = tl.load(order_ptr + rows, mask=row_inside, other=0)
    lse_ptr += (batch.to(tl.int64) * n_heads + head) * n_queries
    if REPAIR:  # noqa: SIM102
        # Another kernel has marked the rows that its arithmetic could not hold.
        if tl.max(tl.load(lse_ptr + tokens, mask=row_inside, other=0.0), 0) < float("inf"):
            return
    cols = tl.arange(0, BLOCK_D)
    q_ptr += batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    q_inside = row_inside[:, None] & (cols[None, :] < D)
    q = tl.load(q_ptr + tokens[:, None] * q_stride_n + cols[None, :], mask=q_inside, other=0.0)

    out_ptr += batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    v_cols = tl.arange(0, BLOCK_DV)

    first = tl.load(offsets_ptr + row)
    n_full = tl.load(full_ptr + row)
    starts_ptr += first
    lengths_ptr += first
    bias_ptr += first
    within = tl.arange(0, BLOCK_N)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if ADD:  # go on from the result so far, as if it were one key of the row
        m_i = tl.load(lse_ptr + tokens, mask=row_inside, other=float("-inf")) * 1.4426950408889634
        l_i = tl.where(m_i == float("-inf"), 0.0, 1.0)
        out_ptrs, out_inside = _results(out_ptr, tokens, v_cols, row_inside, out_stride_n, DV)
        acc = tl.load(out_ptrs, mask=out_inside, other=0.0).to(tl.float32)

    if FULL:
        # A key block of the plan is SUB tiles of this kernel.
        for it in tl.range(0, n_full * SUB):
            start = tl.load(starts_ptr + it // SUB) + (it % SUB) * BLOCK_N
            k = _load_tile(k_ptr, k_desc, batch, k_head, start, k_stride_b, k_stride_h, k_stride_n,
                           n_keys, D, BLOCK_N, BLOCK_D, TMA)  # fmt: skip
            v = _load_tile(v_ptr, v_desc, batch, k_head, start, v_stride_b, v_stride_h, v_stride_n,
                           n_keys, DV, BLOCK_N, BLOCK_DV, TMA)  # fmt: skip
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if RAGGED or HAS_BIAS:
                # A column bias rides on the scaling, a select would not. `start` has no part in it,
                # so that the load pipeline may run ahead. The first tile of a block is never empty:
                # the maximum is finite from the first step on.
                length = tl.load(lengths_ptr + it // SUB) - (it % SUB) * BLOCK_N
                bias = _column_bias(within, length, bias_ptr + it // SUB, HAS_BIAS)
                scores = scores * scale_log2 + bias[None, :]
            if HAS_BIAS:  # which may be -inf
                m_i, l_i, acc = _accumulate_masked(m_i, l_i, acc, scores, v)
            else:
                m_i, l_i, acc = _accumulate_full(m_i, l_i, acc, scores, v, scale_log2, RAGGED)

    if HAS_BOX:
        starts_ptr += n_full
        lengths_ptr += n_full
        bias_ptr += n_full
        if HAS_WORDS:
            WORDS: tl.constexpr = (SUB * BLOCK_N + 31) // 32
            words_ptr += (first + n_full).to(tl.int64) * WORDS
        else:
            box_rows = head.to(tl.int64) * box_stride_h + rows
            lower = tl.load(lower_ptr + box_rows, mask=row_inside, other=0)
            upper = tl.load(upper_ptr + box_rows, mask=row_inside, other=0) | guard
        for it in tl.range(0, n_partial * SUB):
            start = tl.load(starts_ptr + it // SUB) + (it % SUB) * BLOCK_N
            k = _load_tile(k_ptr, k_desc, batch, k_head, start, k_stride_b, k_stride_h, k_stride_n,
                           n_keys, D, BLOCK_N, BLOCK_D, TMA)  # fmt: skip
            v = _load_tile(v_ptr, v_desc, batch, k_head, start, v_stride_b, v_stride_h, v_stride_n,
                           n_keys, DV, BLOCK_N, BLOCK_DV, TMA)  # fmt: skip
            length = tl.load(lengths_ptr + it // SUB) - (it % SUB) * BLOCK_N
            bias = _column_bias(within, length, bias_ptr + it // SUB, HAS_BIAS)
            if not HAS_WORDS:
                above = tl.load(above_ptr + start + within, mask=within < length, other=0) | guard
                below = tl.load(below_ptr + start + within, mask=within < length, other=0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 + bias[None, :]
            if HAS_WORDS:
                inside = _shown(words_ptr + it // SUB * WORDS, (it % SUB) * BLOCK_N + within)
            else:
                inside = _inside(above, below, lower, upper, guard, DISK)
            scores = tl.where(inside, scores, float("-inf"))
            m_i, l_i, acc = _accumulate_masked(m_i, l_i, acc, scores, v)

    acc, lse = _divided(m_i, l_i, acc)
    if HAS_ORDER:  # read again rather than held in registers through the loops
        tokens = tl.load(order_ptr + rows, mask=row_inside, other=0)
    out_ptrs, out_inside = _results(out_ptr, tokens, v_cols, row_inside, out_stride_n, DV)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=out_inside)
    tl.store(lse_ptr + tokens, lse, mask=row_inside)
