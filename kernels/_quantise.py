"""Queries, keys and values in 8 bits, cut into whole blocks. Launched by `quantise.py`."""

import triton
import triton.language as tl


@triton.jit
def _extremes_fwd(
    k_ptr, v_ptr, hidden_ptr, parts_ptr,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    hidden_stride_b, hidden_stride_h, n_heads, n_keys, per_chunk,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    EVERY: tl.constexpr, VALUES: tl.constexpr, HAS_HIDDEN: tl.constexpr,
):  # fmt: skip
    """For a chunk of the keys, channel by channel: the sum of every EVERY-th tile of keys and, with
    VALUES, the sum, the least and the greatest of all values; and how many keys and values those
    sums are of."""
    pair = tl.program_id(1)
    head = (pair % n_heads).to(tl.int64)
    batch = (pair // n_heads).to(tl.int64)
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    hidden_ptr += batch * hidden_stride_b + head * hidden_stride_h
    cols = tl.arange(0, BLOCK_D)[None, :]
    within = tl.arange(0, ROWS)[:, None]
    first = tl.program_id(0) * per_chunk
    stop = tl.minimum(first + per_chunk, n_keys)
    k_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    k_count = tl.zeros([ROWS, 1], tl.float32)
    for start in range(first, stop, ROWS * EVERY):
        rows = (start + within).to(tl.int64)
        seen = rows < n_keys
        if HAS_HIDDEN:
            seen &= tl.load(hidden_ptr + rows, mask=seen, other=1) == 0
        k = tl.load(k_ptr + rows * k_stride_n + cols, mask=seen & (cols < D), other=0.0)
        k_sum += k.to(tl.float32)
        k_count += tl.where(seen, 1.0, 0.0)
    # Tiles are added up whole and their rows at the end: a sum over rows waits for all warps.
    parts_ptr += (pair * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * 6 * BLOCK_D
    parts_ptr += tl.arange(0, BLOCK_D)
    tl.store(parts_ptr, tl.sum(k_sum, 0))
    tl.store(parts_ptr + 4 * BLOCK_D, tl.broadcast_to(tl.sum(k_count, 0), [BLOCK_D]))
    if VALUES:
        v_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
        v_count = tl.zeros([ROWS, 1], tl.float32)
        least = tl.full([ROWS, BLOCK_D], float("inf"), tl.float32)
        most = tl.full([ROWS, BLOCK_D], float("-inf"), tl.float32)
        for start in range(first, stop, ROWS):
            rows = (start + within).to(tl.int64)
            seen = rows < n_keys
            # Rows past the end repeat the last one: that alters no extreme, and needs no select.
            at = v_ptr + tl.minimum(rows, n_keys - 1) * v_stride_n + cols
            if HAS_HIDDEN:
                seen &= tl.load(hidden_ptr + rows, mask=seen, other=1) == 0
                v = tl.load(at, mask=seen & (cols < DV), other=0.0).to(tl.float32)
                least = tl.minimum(least, tl.where(seen, v, float("inf")))
                most = tl.maximum(most, tl.where(seen, v, float("-inf")))
            else:
                v = tl.load(at, mask=(rows >= 0) & (cols < DV), other=0.0).to(tl.float32)
                least = tl.minimum(least, v)
                most = tl.maximum(most, v)
            v_sum += tl.where(seen, v, 0.0)
            v_count += tl.where(seen, 1.0, 0.0)
        tl.store(parts_ptr + BLOCK_D, tl.sum(v_sum, 0))
        tl.store(parts_ptr + 2 * BLOCK_D, tl.min(least, 0))
        tl.store(parts_ptr + 3 * BLOCK_D, tl.max(most, 0))
        tl.store(parts_ptr + 5 * BLOCK_D, tl.broadcast_to(tl.sum(v_count, 0), [BLOCK_D]))


@triton.jit
def _centres_fwd(
    parts_ptr, centres_ptr, n_chunks, range_v,
    BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Of each head: the mean key, the mean value, and the step of each channel of the values."""
    pair = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    chunk = tl.arange(0, CHUNKS)
    inside = tl.broadcast_to((chunk < n_chunks)[:, None], [CHUNKS, BLOCK_D])
    ptrs = parts_ptr + (pair * n_chunks + chunk)[:, None] * 6 * BLOCK_D + cols[None, :]
    centres_ptr += pair * 3 * BLOCK_D + cols
    k_sum = tl.sum(tl.load(ptrs, mask=inside, other=0.0), 0)
    k_count = tl.sum(tl.load(ptrs + 4 * BLOCK_D, mask=inside, other=0.0), 0)
    tl.store(centres_ptr, k_sum / tl.maximum(k_count, 1.0))
    if VALUES:
        count = tl.sum(tl.load(ptrs + 5 * BLOCK_D, mask=inside, other=0.0), 0)
        total = tl.sum(tl.load(ptrs + BLOCK_D, mask=inside, other=0.0), 0)
        mean = total / tl.maximum(count, 1.0)
        least = tl.min(tl.load(ptrs + 2 * BLOCK_D, mask=inside, other=float("inf")), 0)
        most = tl.max(tl.load(ptrs + 3 * BLOCK_D, mask=inside, other=float("-inf")), 0)
        reach = tl.maximum(tl.maximum(most - mean, mean - least), 1e-12)
        tl.store(centres_ptr + BLOCK_D, mean)
        tl.store(centres_ptr + 2 * BLOCK_D, reach / range_v)


@triton.jit
def _load_block(x_ptr, stride_n, starts_ptr, order_ptr, block, cols,
                D: tl.constexpr, SIZE: tl.constexpr, HAS_ORDER: tl.constexpr,
                REPEAT: tl.constexpr):  # fmt: skip
    """A block in fp32, and which of its elements there are; the others are 0.

    REPEAT: rows that a short block lacks are copies of its last one."""
    start = tl.load(starts_ptr + block)
    within = tl.arange(0, SIZE)
    inside = within < tl.load(starts_ptr + block + 1) - start
    rows = start + within
    if REPEAT:
        rows = tl.minimum(rows, tl.load(starts_ptr + block + 1) - 1)
        inside = within < SIZE
    tokens = rows.to(tl.int64)
    if HAS_ORDER:
        tokens = tl.load(order_ptr + tokens, mask=inside, other=0)
    inside = inside[:, None] & (cols < D)[None, :]
    x = tl.load(x_ptr + tokens[:, None] * stride_n + cols[None, :], mask=inside, other=0.0)
    return x.to(tl.float32), inside


@triton.jit
def _store_rows(x, number, out_ptr, step_ptr, cols,
                SIZE: tl.constexpr, BLOCK_D: tl.constexpr, INTEGERS: tl.constexpr):  # fmt: skip
    """One step for a whole block."""
    reach = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), 1e-12)
    step = reach / (127.0 if INTEGERS else 448.0)
    tl.store(step_ptr + number, step)
    x = x * (1.0 / step)
    if INTEGERS:  # to the nearest: a conversion would cut
        x = (x + 12582912.0) - 12582912.0
    offsets = tl.arange(0, SIZE)[:, None] * BLOCK_D + cols[None, :]
    out_ptr += number * SIZE * BLOCK_D
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty))


@triton.jit
def _quantise_fwd(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, v_out_ptr,
    q_step_ptr, k_step_ptr, shift_ptr, centres_ptr,
    q_starts_ptr, k_starts_ptr, order_ptr,
    q_stride_b, q_stride_h, q_stride_n,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    order_stride_h, n_heads, n_q_blocks, n_k_blocks, n_queries,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, SIZE: tl.constexpr,
    INTEGERS: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """One block of keys, queries or values."""
    block = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    head = pair % n_heads
    batch = pair // n_heads
    order_ptr += head * order_stride_h
    centres_ptr += pair * 3 * BLOCK_D
    cols = tl.arange(0, BLOCK_D)
    if tl.program_id(2) == 0:
        if block < n_k_blocks:
            k_ptr += batch * k_stride_b + head * k_stride_h
            k, k_inside = _load_block(k_ptr, k_stride_n, k_starts_ptr, order_ptr, block, cols,
                                      D, SIZE, HAS_ORDER, True)  # fmt: skip
            k = tl.where(k_inside, k - tl.load(centres_ptr + cols)[None, :], 0.0)
            number = pair * n_k_blocks + block
            _store_rows(k, number, k_out_ptr, k_step_ptr, cols, SIZE, BLOCK_D, INTEGERS)
    elif tl.program_id(2) == 1:
        if block < n_q_blocks:
            q_ptr += batch * q_stride_b + head * q_stride_h
            q, _ = _load_block(q_ptr, q_stride_n, q_starts_ptr, order_ptr, block, cols,
                               D, SIZE, HAS_ORDER, False)  # fmt: skip
            number = pair * n_q_blocks + block
            shift = tl.sum(q * tl.load(centres_ptr + cols)[None, :], 1)
            rows = tl.load(q_starts_ptr + block) + tl.arange(0, SIZE)
            inside = rows < tl.load(q_starts_ptr + block + 1)
            tl.store(shift_ptr + pair * n_queries + rows, shift, mask=inside)
            _store_rows(q, number, q_out_ptr, q_step_ptr, cols, SIZE, BLOCK_D, INTEGERS)
    elif block < n_k_blocks:
        v_ptr += batch * v_stride_b + head * v_stride_h
        v, v_inside = _load_block(v_ptr, v_stride_n, k_starts_ptr, order_ptr, block, cols,
                                  DV, SIZE, HAS_ORDER, False)  # fmt: skip
        v -= tl.load(centres_ptr + BLOCK_D + cols)[None, :]
        v = tl.where(v_inside, v * (1.0 / tl.load(centres_ptr + 2 * BLOCK_D + cols))[None, :], 0.0)
        column = block.to(tl.int64) * SIZE + tl.arange(0, SIZE)
        v_rows = (pair * BLOCK_D + cols)[:, None] * n_k_blocks * SIZE
        tl.store(v_out_ptr + v_rows + column[None, :], tl.trans(v.to(v_out_ptr.dtype.element_ty)))
