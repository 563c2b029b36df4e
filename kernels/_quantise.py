"""Queries, keys and values in 8 bits, cut into whole blocks. Launched by `quantise.py`."""

import triton
import triton.language as tl


@triton.jit
def _extremes_fwd(
    k_ptr, v_ptr, hidden_ptr, parts_ptr,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    hidden_stride_b, hidden_stride_h, n_heads, n_keys, per_chunk,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    EVERY: tl.constexpr, VALUES: tl.constexpr, HAS_HIDDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """For a chunk of the keys, channel by channel: the sum of every EVERY-th tile of keys and, with
    VALUES, the sum, the least and the greatest of every EVERY-th tile of values; and how many keys
    and values those sums are of."""
    pair, chunk = tl.program_id(0), tl.program_id(1)
    head = (pair % n_heads).to(tl.int64)
    batch = (pair // n_heads).to(tl.int64)
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    hidden_ptr += batch * hidden_stride_b + head * hidden_stride_h
    cols = tl.arange(0, BLOCK_D)[None, :]
    within = tl.arange(0, ROWS)[:, None]
    first = chunk * per_chunk
    stop = tl.minimum(first + per_chunk, n_keys)
    k_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    k_count = tl.zeros([ROWS, 1], tl.float32)
    for start in tl.range(first, stop, ROWS * EVERY, num_stages=STAGES):
        rows = (start + within).to(tl.int64)
        seen = rows < n_keys
        if HAS_HIDDEN:
            seen &= tl.load(hidden_ptr + rows, mask=seen, other=1) == 0
        k = tl.load(k_ptr + rows * k_stride_n + cols, mask=seen & (cols < D), other=0.0)
        k_sum += k.to(tl.float32)
        k_count += tl.where(seen, 1.0, 0.0)
    # Tiles are added up whole and their rows at the end: a sum over rows waits for all warps.
    parts_ptr += (pair * tl.num_programs(1) + chunk).to(tl.int64) * 6 * BLOCK_D
    parts_ptr += tl.arange(0, BLOCK_D)
    tl.store(parts_ptr, tl.sum(k_sum, 0))
    tl.store(parts_ptr + 4 * BLOCK_D, tl.broadcast_to(tl.sum(k_count, 0), [BLOCK_D]))
    if VALUES:
        v_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
        v_count = tl.zeros([ROWS, 1], tl.float32)
        least = tl.full([ROWS, BLOCK_D], float("inf"), tl.float32)
        most = tl.full([ROWS, BLOCK_D], float("-inf"), tl.float32)
        for start in tl.range(first, stop, ROWS * EVERY, num_stages=STAGES):
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
    parts_ptr, centres_ptr, excess_ptr, n_chunks, range_v, floor,
    BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Of each head: the mean key, the mean value, and the step of each channel of the values, of
    which none is known to be out of range yet."""
    pair = tl.program_id(0).to(tl.int64)
    tl.store(excess_ptr + pair, 0.0)
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
        # A channel that is nearly constant in a sample need not be so elsewhere.
        reach = tl.maximum(reach, tl.max(reach, 0) * floor)
        tl.store(centres_ptr + BLOCK_D, mean)
        tl.store(centres_ptr + 2 * BLOCK_D, reach / range_v)


@triton.jit
def _block(x_ptr, stride_n, order_ptr, start, stop,
           D: tl.constexpr, BLOCK_D: tl.constexpr, SIZE: tl.constexpr, HAS_ORDER: tl.constexpr,
           ):  # fmt: skip
    """The rows of a block, 0 beyond the head dim. A short one ends in copies of its last row."""
    tokens = tl.minimum(start + tl.arange(0, SIZE), stop - 1).to(tl.int64)
    if HAS_ORDER:
        tokens = tl.load(order_ptr + tokens)
    cols = tl.arange(0, BLOCK_D)[None, :]
    at = x_ptr + tokens[:, None] * stride_n + cols
    if D == BLOCK_D:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=tl.broadcast_to(cols < D, at.shape), other=0.0)
    return x.to(tl.float32)


@triton.jit
def _quantise_rows_fwd(
    x_ptr, out_ptr, step_ptr, shift_ptr, centres_ptr, starts_ptr, order_ptr,
    stride_b, stride_h, stride_n, order_stride_h, n_heads, n_tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SIZE: tl.constexpr,
    KEYS: tl.constexpr, INTEGERS: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """A block of keys or of queries.

    Programs that run at the same time have the same blocks of all heads, whose rows may stand side
    by side in memory.
    """
    pair, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = pair % n_heads
    x_ptr += (pair // n_heads) * stride_b + head * stride_h
    start, stop = tl.load(starts_ptr + block), tl.load(starts_ptr + block + 1)
    x = _block(x_ptr, stride_n, order_ptr + head * order_stride_h, start, stop,
               D, BLOCK_D, SIZE, HAS_ORDER)  # fmt: skip
    cols = tl.arange(0, BLOCK_D)
    within = tl.arange(0, SIZE)
    centre = tl.load(centres_ptr + pair * 3 * BLOCK_D + cols)[None, :]
    if KEYS:
        x -= centre
    else:
        at = shift_ptr + pair * n_tokens + start + within
        tl.store(at, tl.sum(x * centre, 1), mask=within < stop - start)
    number = pair * tl.num_programs(1) + block
    if INTEGERS:
        step = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), 1e-12) / 127.0  # one for the block
    else:
        # No row is longer than 224, nor than 240 when it is rounded, so float16 holds the product
        # of any two. e4m3 has small numbers to spare.
        step = tl.maximum(tl.max(tl.sqrt(tl.sum(x * x, 1)), 0), 1e-12) / 224.0
    tl.store(step_ptr + number, step)
    x = x * (1.0 / step)
    if INTEGERS:  # to the nearest: a conversion would cut
        x = (x + 12582912.0) - 12582912.0
    out_ptr += number * SIZE * BLOCK_D
    tl.store(out_ptr + within[:, None] * BLOCK_D + cols[None, :], x.to(out_ptr.dtype.element_ty))


@triton.jit
def _quantise_values_fwd(
    x_ptr, out_ptr, centres_ptr, excess_ptr, hidden_ptr, starts_ptr, order_ptr,
    stride_b, stride_h, stride_n, order_stride_h, n_heads, hidden_stride_b,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SIZE: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_HIDDEN: tl.constexpr, SAMPLED: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """A block of values, transposed; see `_quantise_rows_fwd`.

    SAMPLED: steps are of some of the values, with room for others; should one have none, the head's
    greatest is noted, and the launch that does it AGAIN makes all of the head's steps longer.
    """
    pair, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = pair % n_heads
    if AGAIN:
        excess = tl.load(excess_ptr + pair)
        if excess == 0.0:
            return
    x_ptr += (pair // n_heads) * stride_b + head * stride_h
    start, stop = tl.load(starts_ptr + block), tl.load(starts_ptr + block + 1)
    x = _block(x_ptr, stride_n, order_ptr + head * order_stride_h, start, stop,
               D, BLOCK_D, SIZE, HAS_ORDER)  # fmt: skip
    cols = tl.arange(0, BLOCK_D)
    within = tl.arange(0, SIZE)
    centres_ptr += pair * 3 * BLOCK_D + cols
    x -= tl.load(centres_ptr + BLOCK_D)[None, :]
    x *= 1.0 / tl.load(centres_ptr + 2 * BLOCK_D)[None, :]
    x = tl.where((within < stop - start)[:, None], x, 0.0)
    if AGAIN:
        x *= 448.0 / excess
    elif SAMPLED:
        most = tl.max(tl.max(tl.abs(x), 1), 0)
        counts = most > 448.0
        if HAS_HIDDEN:
            hidden_ptr += (pair // n_heads) * hidden_stride_b + block
            counts &= tl.load(hidden_ptr) == 0
        if counts:
            tl.atomic_max(excess_ptr + pair, most)
    x = x.to(out_ptr.dtype.element_ty)
    out_ptr += (pair * tl.num_programs(1) + block) * SIZE * BLOCK_D
    tl.store(out_ptr + cols[:, None] * SIZE + within[None, :], tl.trans(x))
