"""Pooled rows and a tail, added to attention over exact keys. Launched by `approximate.py`."""

import triton
import triton.language as tl


@triton.jit
def _slope_product(r, q_ptr, q_stride_n, tokens, row_inside, weight, slope_ptr,
                   D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
                   BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """`r + (weight * q) @ slope`, in chunks of the head dim so that no D x D matrix is held."""
    v_cols = tl.arange(0, BLOCK_DV)
    for d in tl.static_range(0, BLOCK_D, CHUNK):
        cols = d + tl.arange(0, CHUNK)
        inside = row_inside[:, None] & (cols < D)[None, :]
        q = tl.load(q_ptr + tokens[:, None] * q_stride_n + cols[None, :], mask=inside, other=0.0)
        ptrs = slope_ptr + cols[:, None] * DV + v_cols[None, :]
        slope = tl.load(ptrs, mask=(cols < D)[:, None] & (v_cols < DV)[None, :], other=0.0)
        weighted = (q.to(tl.float32) * weight[:, None]).to(q.dtype)
        r = tl.dot(weighted, slope, r, input_precision="ieee")
    return r


@triton.jit
def _load_rows(ptr, rows, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a `[R, D]` matrix by number, zeros where not inside."""
    cols = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (cols < D)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * D + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _soften(m_i, l_i, acc, scores, v):
    """One step of the online softmax; rows that have seen no key yet keep -inf."""
    m_new = tl.maximum(m_i, tl.max(scores, 1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.math.exp2(scores - m_safe[:, None])
    alpha = tl.math.exp2(m_i - m_safe)
    mass = tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_new, l_i * alpha + mass, acc, alpha, mass


@triton.jit
def _pooled_row(nth, counts_ptr, n_k_blocks, SIZE: tl.constexpr, FACTORS: tl.constexpr):
    """Of the nth pooled row that a query block reads: its entry, and its row but for what the
    entry's block adds, which is the second number for every block."""
    entry = nth
    rest = nth
    per_block = tl.zeros_like(nth) + 1
    listed_before = 0
    rows_before = 0
    base = 0
    nth_factor = 0
    for s in tl.static_range(1, 8):
        if (FACTORS >> s) & 1:
            groups = SIZE >> s if SIZE >> s > 1 else 1
            here = nth >= rows_before
            entry = tl.where(here, listed_before + (nth - rows_before) // groups, entry)
            rest = tl.where(here, base + (nth - rows_before) % groups, rest)
            per_block = tl.where(here, groups, per_block)
            listed = tl.load(counts_ptr + nth_factor)
            listed_before += listed
            rows_before += listed * groups
            base += n_k_blocks * groups
            nth_factor += 1
    return entry, rest, per_block


@triton.jit
def _pooled_rows(counts_ptr, SIZE: tl.constexpr, FACTORS: tl.constexpr):
    """How many pooled rows a query block reads."""
    rows = 0
    nth_factor = 0
    for s in tl.static_range(1, 8):
        if (FACTORS >> s) & 1:
            rows += tl.load(counts_ptr + nth_factor) * (SIZE >> s if SIZE >> s > 1 else 1)
            nth_factor += 1
    return rows


@triton.jit
def _approximate_fwd(
    q_ptr, k_ptr, v_ptr, bias_ptr, k_mean_ptr, v_mean_ptr, slope_ptr, out_ptr, lse_ptr,
    indices_ptr, offsets_ptr, full_ptr, partial_ptr, counts_ptr,
    visited_ptr, hidden_ptr, starts_ptr, q_starts_ptr, order_ptr,
    q_stride_b, q_stride_h, q_stride_n, out_stride_b, out_stride_h, out_stride_n,
    list_stride_b, list_stride_h, order_stride_h, hidden_stride_b,
    n_heads, n_q_blocks, n_k_blocks, n_queries, pooled_rows, scale, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    SIZE: tl.constexpr,
    FACTORS: tl.constexpr, N_FACTORS: tl.constexpr, TAIL: tl.constexpr,
    HAS_HIDDEN: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Goes on from `out` and `lse` as if they were one key of each row.

    TAIL: 0 none, 1 means only, 2 with one slope for all blocks, 3 with a slope for each.
    """
    pid = tl.program_id(0) // PARTS  # of the same block, which read the same rows
    block = pid % n_q_blocks
    head = (pid // n_q_blocks) % n_heads
    batch = pid // n_q_blocks // n_heads
    pair = (batch * n_heads + head).to(tl.int64)
    row = batch * list_stride_b + head * list_stride_h + block

    rows = tl.load(q_starts_ptr + block) + tl.arange(0, BLOCK_M)
    rows += tl.program_id(0) % PARTS * BLOCK_M
    row_inside = rows < tl.load(q_starts_ptr + block + 1)
    tokens = rows.to(tl.int64)
    if HAS_ORDER:
        order_ptr += head * order_stride_h
        tokens = tl.load(order_ptr + rows, mask=row_inside, other=0)
    cols = tl.arange(0, BLOCK_D)
    q_ptr += batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    q_inside = row_inside[:, None] & (cols < D)[None, :]
    q = tl.load(q_ptr + tokens[:, None] * q_stride_n + cols[None, :], mask=q_inside, other=0.0)

    out_ptr += batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    lse_ptr += pair * n_queries
    v_cols = tl.arange(0, BLOCK_DV)
    out_ptrs = out_ptr + tokens[:, None] * out_stride_n + v_cols[None, :]
    out_inside = row_inside[:, None] & (v_cols < DV)[None, :]
    m_i = tl.load(lse_ptr + tokens, mask=row_inside, other=float("-inf")) * 1.4426950408889634
    l_i = tl.where(m_i == float("-inf"), 0.0, 1.0)
    acc = tl.load(out_ptrs, mask=out_inside, other=0.0).to(tl.float32)
    within = tl.arange(0, BLOCK_N)

    if N_FACTORS > 0:
        indices_ptr += tl.load(offsets_ptr + row) + tl.load(full_ptr + row)
        indices_ptr += tl.load(partial_ptr + row)
        k_ptr += pair * pooled_rows * D
        v_ptr += pair * pooled_rows * DV
        counts_ptr += row.to(tl.int64) * N_FACTORS
        total = _pooled_rows(counts_ptr, SIZE, FACTORS)
        for first in range(0, total, BLOCK_N):
            nth = first + within
            entry, rest, per_block = _pooled_row(nth, counts_ptr, n_k_blocks, SIZE, FACTORS)
            listed = tl.load(indices_ptr + entry, mask=nth < total, other=0)
            pooled = listed * per_block + rest
            k = _load_rows(k_ptr, pooled, nth < total, D, BLOCK_D)
            v = _load_rows(v_ptr, pooled, nth < total, DV, BLOCK_DV)
            bias = tl.load(bias_ptr + pooled, mask=nth < total, other=float("-inf"))
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 + bias[None, :]
            m_i, l_i, acc, _, _ = _soften(m_i, l_i, acc, scores, v)

    # The tail's own mass, rescaled with all other sums whenever the maximum rises.
    tail = tl.zeros([BLOCK_M], tl.float32)
    if TAIL > 0:
        k_mean_ptr += pair * n_k_blocks * D
        v_mean_ptr += pair * n_k_blocks * DV
        visited_ptr += row.to(tl.int64) * n_k_blocks
        hidden_ptr += batch * hidden_stride_b
        for first in range(0, n_k_blocks, BLOCK_N):
            number = first + within
            inside = number < n_k_blocks
            inside = inside & (tl.load(visited_ptr + number, mask=inside, other=1) == 0)
            if HAS_HIDDEN:
                inside = inside & (tl.load(hidden_ptr + number, mask=inside, other=1) == 0)
            start = tl.load(starts_ptr + number, mask=inside, other=0)
            stop = tl.load(starts_ptr + number + 1, mask=inside, other=1)
            k = _load_rows(k_mean_ptr, number, inside, D, BLOCK_D).to(q.dtype)
            v = _load_rows(v_mean_ptr, number, inside, DV, BLOCK_DV).to(q.dtype)
            bias = tl.math.log2((stop - start).to(tl.float32))
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            scores = tl.where(inside[None, :], scores + bias[None, :], float("-inf"))
            m_i, l_i, acc, alpha, mass = _soften(m_i, l_i, acc, scores, v)
            tail = tail * alpha + mass

    empty = l_i == 0.0
    l_safe = tl.where(empty, 1.0, l_i)
    m_safe = tl.where(empty, 0.0, m_i)
    acc = acc / l_safe[:, None]
    # Weights of slopes are shares of the softmax, at most 1, so that they fit a 16-bit query.
    if TAIL == 2:
        slope_ptr += pair * D * DV
        acc = _slope_product(acc, q_ptr, q_stride_n, tokens, row_inside, tail / l_safe * scale,
                             slope_ptr, D, DV, BLOCK_D, BLOCK_DV, CHUNK)  # fmt: skip
    if TAIL == 3:
        slope_ptr += pair * n_k_blocks * D * DV
        for number in range(n_k_blocks):
            unlisted = tl.load(visited_ptr + number) == 0
            if HAS_HIDDEN:
                unlisted = unlisted & (tl.load(hidden_ptr + number) == 0)
            if unlisted:
                length = tl.load(starts_ptr + number + 1) - tl.load(starts_ptr + number)
                mean = tl.load(k_mean_ptr + number * D + cols, mask=cols < D, other=0.0)
                mean = mean.to(q.dtype).to(tl.float32)  # as the tail's scores have it
                logit = tl.sum(q.to(tl.float32) * mean[None, :], 1) * scale_log2
                share = tl.math.exp2(logit - m_safe + tl.math.log2(length.to(tl.float32)))
                slope = slope_ptr + tl.cast(number, tl.int64) * D * DV
                acc = _slope_product(acc, q_ptr, q_stride_n, tokens, row_inside,
                                     share / l_safe * scale, slope,
                                     D, DV, BLOCK_D, BLOCK_DV, CHUNK)  # fmt: skip

    acc = tl.where(empty[:, None], 0.0, acc)  # a slope may hold NaN, which no weight of 0 hides
    lse = tl.where(empty, float("-inf"), (m_i + tl.math.log2(l_safe)) * 0.6931471805599453)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=out_inside)
    tl.store(lse_ptr + tokens, lse, mask=row_inside)
