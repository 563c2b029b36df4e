"""Means and key-value covariances of blocks of tokens. Launched by `pool.py`."""

import triton
import triton.language as tl


@triton.jit
def _store_groups(ptr, bias_ptr, sums, block, n_blocks, length, cols, first,
                  D: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr,
                  LEAST: tl.constexpr):  # fmt: skip
    """Means of a block's groups of 2**S tokens, and the logarithms of their counts, which are the
    same for all heads; returns where those of the next factor begin.

    LEAST: rows that a block has at least, each group in several where it has fewer; above 1 groups
    without tokens repeat the last one that has some, and no logarithms are written.
    """
    ROWS: tl.constexpr = GROUPS if GROUPS > LEAST else LEAST
    group = tl.arange(0, GROUPS)
    count = tl.minimum(tl.maximum(length - (group << S), 0), 1 << S)
    mean = sums / tl.maximum(count, 1)[:, None]
    rows = tl.arange(0, ROWS)
    if LEAST > 1:
        if length <= (GROUPS - 1) << S:
            last = (group == (length - 1) >> S)[:, None]
            last_mean = tl.sum(tl.where(last, mean, 0.0), 0)
            mean = tl.where((count > 0)[:, None], mean, last_mean[None, :])
        if ROWS > GROUPS:
            copies = tl.broadcast_to(mean[:, None, :], [GROUPS, ROWS // GROUPS, cols.shape[0]])
            mean = tl.reshape(copies, [ROWS, cols.shape[0]])
    ptrs = ptr + (block * ROWS + rows).to(tl.int64)[:, None] * D + cols[None, :]
    tl.store(ptrs, mean.to(ptr.dtype.element_ty), mask=(cols < D)[None, :])
    if LEAST == 1:
        bias = tl.math.log2(tl.maximum(count, 1).to(tl.float32))
        bias = tl.where(count > 0, bias, float("-inf"))
        tl.store(bias_ptr + block * GROUPS + group, bias, mask=group < tl.where(first, GROUPS, 0))
    return ptr + n_blocks * ROWS * D, bias_ptr + n_blocks * ROWS


@triton.jit
def _means_fwd(
    x0_ptr, x1_ptr, pooled_ptr, bias_ptr, means_ptr, starts_ptr, order_ptr,
    x0_stride_b, x0_stride_h, x0_stride_n, x1_stride_b, x1_stride_h, x1_stride_n,
    order_stride_h, n_heads, n_pairs, n_blocks, pooled_rows,
    D: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr,
    FACTORS: tl.constexpr, HAS_ORDER: tl.constexpr, MEANS: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Every block of one or two tensors once: its mean, and the means of its groups for the factors
    in FACTORS.

    FACTORS has bit s set for factor 2**s. The rows of a factor begin behind those of the smaller
    ones, and a block has as many as a whole block would, so that rows are found by arithmetic.
    """
    # Columns, then heads are neighbours in the launch order, as they mostly are in memory.
    PARTS: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    part = tl.program_id(0) % PARTS
    pid = tl.program_id(0) // PARTS
    head = pid % n_heads
    block = (pid // n_heads) % n_blocks
    batch = pid // n_heads // n_blocks
    cols = part * COLUMNS + tl.arange(0, COLUMNS)
    col_inside = cols < D

    start = tl.load(starts_ptr + block)
    length = tl.load(starts_ptr + block + 1) - start
    within = tl.arange(0, SIZE)
    tokens = (start + within).to(tl.int64)
    if HAS_ORDER:
        tokens = tl.load(order_ptr + head * order_stride_h + tokens, mask=within < length, other=0)
    if tl.program_id(1) == 0:
        x_ptr = x0_ptr + batch.to(tl.int64) * x0_stride_b + head.to(tl.int64) * x0_stride_h
        stride_n = x0_stride_n
    else:
        x_ptr = x1_ptr + batch.to(tl.int64) * x1_stride_b + head.to(tl.int64) * x1_stride_h
        stride_n = x1_stride_n
    inside = (within < length)[:, None] & col_inside[None, :]
    x = tl.load(x_ptr + tokens[:, None] * stride_n + cols[None, :], mask=inside, other=0.0)
    # Outputs of the second tensor stand behind those of the first.
    entry = (tl.program_id(1) * n_pairs + batch * n_heads + head).to(tl.int64)
    sums = x.to(tl.float32)
    if MEANS:  # in fp32: covariances are taken about it
        mean = tl.sum(sums, 0) / tl.maximum(length, 1)
        means_ptr += (entry * n_blocks + block) * D
        tl.store(means_ptr + cols, mean, mask=col_inside)
    pooled_ptr += entry * pooled_rows * D
    first = (entry == 0) & (part == 0)
    for s in tl.static_range(1, 8):
        if FACTORS >> s:  # no larger factor, no more sums
            if s <= LOG_SIZE:
                sums = tl.sum(tl.reshape(sums, [SIZE >> s, 2, COLUMNS]), 1)
            if (FACTORS >> s) & 1:
                pooled_ptr, bias_ptr = _store_groups(
                    pooled_ptr, bias_ptr, sums, block, n_blocks, length, cols, first,
                    D, s, SIZE >> s if s < LOG_SIZE else 1, LEAST)  # fmt: skip


@triton.jit
def _covariance_fwd(
    k_ptr, v_ptr, means_ptr, hidden_ptr, centre_ptr, sum_ptr, squares_ptr, each_ptr,
    starts_ptr, order_ptr,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    order_stride_h, hidden_stride_b, n_heads, n_blocks, n_chunks, per_chunk,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, SUB: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_HIDDEN: tl.constexpr,
    HAS_CENTRE: tl.constexpr, SUM: tl.constexpr, SQUARES: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Covariances H_j of a chunk of blocks, for some columns of v: their sum, their squared
    norms (after `centre` is subtracted), or each of them."""
    pid = tl.program_id(0)
    chunk = pid % n_chunks
    head = (pid // n_chunks) % n_heads
    batch = pid // n_chunks // n_heads
    entry = (batch * n_heads + head).to(tl.int64)
    rows_d = tl.arange(0, BLOCK_D)
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    matrix = rows_d[:, None] * DV + cols[None, :]
    matrix_inside = (rows_d < D)[:, None] & (cols < DV)[None, :]
    k_ptr += batch.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
    v_ptr += batch.to(tl.int64) * v_stride_b + head.to(tl.int64) * v_stride_h

    total = tl.zeros([BLOCK_D, COLUMNS], tl.float32)
    centre = tl.zeros([BLOCK_D, COLUMNS], tl.float32)
    if HAS_CENTRE:
        centre = tl.load(centre_ptr + entry * D * DV + matrix, mask=matrix_inside, other=0.0)
    first = chunk * per_chunk
    for block in range(first, tl.minimum(first + per_chunk, n_blocks)):
        start = tl.load(starts_ptr + block)
        stop = tl.load(starts_ptr + block + 1)
        mean_ptr = means_ptr + (entry * n_blocks + block) * D
        mean = tl.load(mean_ptr + rows_d, mask=rows_d < D, other=0.0)
        one = tl.zeros([BLOCK_D, COLUMNS], tl.float32)
        for sub in tl.static_range(SUB):
            positions = start + sub * ROWS + tl.arange(0, ROWS)
            inside = positions < stop
            tokens = positions.to(tl.int64)
            if HAS_ORDER:
                tokens = tl.load(order_ptr + head * order_stride_h + tokens, mask=inside, other=0)
            k_ptrs = k_ptr + tokens[:, None] * k_stride_n + rows_d[None, :]
            k = tl.load(k_ptrs, mask=inside[:, None] & (rows_d < D)[None, :], other=0.0)
            v_ptrs = v_ptr + tokens[:, None] * v_stride_n + cols[None, :]
            v = tl.load(v_ptrs, mask=inside[:, None] & (cols < DV)[None, :], other=0.0)
            # Rows past the end of the block hold zeros in v: what k has there does not count.
            centred = (k.to(tl.float32) - mean[None, :]).to(v.dtype)
            one = tl.dot(tl.trans(centred), v, one, input_precision="ieee")
        if HAS_HIDDEN:  # a product with 0 would keep NaN
            hidden = tl.load(hidden_ptr + batch * hidden_stride_b + block)
            one = tl.where(hidden != 0, 0.0, one)
        if SUM:
            total += one
        if SQUARES:
            squares = tl.sum(tl.sum((one - centre) * (one - centre), 1), 0)
            at = (entry * n_blocks + block) * tl.num_programs(1) + tl.program_id(1)
            tl.store(squares_ptr + at, squares)
        if EACH:
            each = each_ptr + (entry * n_blocks + block) * D * DV
            scaled = one / (stop - start)
            tl.store(each + matrix, scaled.to(each_ptr.dtype.element_ty), mask=matrix_inside)
    if SUM:
        sum_ptr += (entry * n_chunks + chunk) * D * DV
        tl.store(sum_ptr + matrix, total, mask=matrix_inside)
