"""Query blocks by the length of their lists, in one launch. Launched by `longest_first.py`."""

import triton
import triton.language as tl


@triton.jit
def _quarters(number):
    """Integers that rise with the logarithm of a number, four to a factor of 2: the exponent of the
    float and the first two bits behind its point."""
    return number.to(tl.float32).to(tl.int32, bitcast=True) >> 21


@triton.jit
def _bucket(full_ptr, partial_ptr, place, n_places, n_rows, n_heads, stride_b, stride_h,
            longest, BUCKETS: tl.constexpr, BOTH: tl.constexpr):  # fmt: skip
    """The bucket of the tile at each place, 0 for lists of all key blocks; `BUCKETS` behind the
    last one."""
    inside = place < n_places
    pair = place // n_rows
    row = pair // n_heads * stride_b + pair % n_heads * stride_h + place % n_rows
    entries = tl.load(full_ptr + row, mask=inside, other=0)
    if BOTH:
        entries += tl.load(partial_ptr + row, mask=inside, other=0)
    bucket = tl.minimum(tl.maximum(longest - _quarters(entries), 0), BUCKETS - 1)
    return tl.where(inside, bucket, BUCKETS)


@triton.jit
def _longest_first_fwd(
    full_ptr, partial_ptr, queue_ptr, stride_b, stride_h,
    n_heads, n_rows, n_key_blocks, n_places,
    BUCKETS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """Every program counts all lists, and puts its own behind those of longer buckets and behind
    those of its bucket that come before: the same order in every run, without a second launch."""
    begin = tl.program_id(0) * ROWS
    longest = _quarters(n_key_blocks)
    bins = tl.arange(0, 2 * BUCKETS)
    every = tl.zeros([2 * BUCKETS], tl.int32)
    before = tl.zeros([2 * BUCKETS], tl.int32)
    for first in range(0, n_places, CHUNK):
        place = first + tl.arange(0, CHUNK)
        bucket = _bucket(full_ptr, partial_ptr, place, n_places, n_rows, n_heads, stride_b,
                         stride_h, longest, BUCKETS, BOTH)  # fmt: skip
        every += tl.histogram(bucket, 2 * BUCKETS)
        before += tl.histogram(tl.where(place < begin, bucket, BUCKETS), 2 * BUCKETS)
    base = tl.cumsum(every, 0) - every + before

    place = begin + tl.arange(0, ROWS)
    bucket = _bucket(full_ptr, partial_ptr, place, n_places, n_rows, n_heads, stride_b, stride_h,
                     longest, BUCKETS, BOTH)  # fmt: skip
    mine = (bucket[:, None] == bins[None, :]).to(tl.int32)
    at = tl.sum(mine * (tl.cumsum(mine, 0) - 1 + base[None, :]), 1)
    tl.store(queue_ptr + at, place, mask=place < n_places)
