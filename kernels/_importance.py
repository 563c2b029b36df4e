"""Highest weights between sampled queries and keys of block pairs. Launched by `importance.py`."""

import triton
import triton.language as tl


@triton.jit
def _take_fwd(
    x0_ptr, x1_ptr, out_ptr, index_ptr,
    x0_stride_b, x0_stride_h, x0_stride_n, x1_stride_b, x1_stride_h, x1_stride_n,
    n_heads, n_taken,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of two tensors, each at positions of its own in every head."""
    which = tl.program_id(2)
    pair = tl.program_id(1)
    head = (pair % n_heads).to(tl.int64)
    batch = (pair // n_heads).to(tl.int64)
    nth = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = nth < n_taken
    cols = tl.arange(0, BLOCK_D)
    tokens = tl.load(index_ptr + (which * n_heads + head) * n_taken + nth, mask=inside, other=0)
    x_ptr, stride_n = x0_ptr + batch * x0_stride_b + head * x0_stride_h, x0_stride_n
    if which == 1:
        x_ptr, stride_n = x1_ptr + batch * x1_stride_b + head * x1_stride_h, x1_stride_n
    both = inside[:, None] & (cols < D)[None, :]
    x = tl.load(x_ptr + tokens[:, None] * stride_n + cols[None, :], mask=both, other=0.0)
    at = (which * tl.num_programs(1) + pair).to(tl.int64) * n_taken + nth
    tl.store(out_ptr + at[:, None] * D + cols[None, :], x, mask=both)


@triton.jit
def _tile_scores(q, k_ptr, hidden_ptr, row, first, keys, D: tl.constexpr,
                 BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, COUNT: tl.constexpr,
                 TMA: tl.constexpr, WHOLE: tl.constexpr, HAS_HIDDEN: tl.constexpr):  # fmt: skip
    """Unscaled scores against the sampled keys `first .. first + BLOCK_N` of the head whose keys
    begin at a row, -inf for those unseen."""
    number = first + tl.arange(0, BLOCK_N)
    inside = number < keys
    if TMA:
        k = k_ptr.load([row + first, 0])
    else:
        cols = tl.arange(0, BLOCK_D)
        ptrs = k_ptr + (row.to(tl.int64) + number)[:, None] * D + cols[None, :]
        if WHOLE:
            k = tl.load(ptrs, mask=(cols < D)[None, :], other=0.0)
        else:
            k = tl.load(ptrs, mask=inside[:, None] & (cols < D)[None, :], other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if HAS_HIDDEN:
        inside = inside & (tl.load(hidden_ptr + number // COUNT, mask=inside, other=1) == 0)
    if HAS_HIDDEN or not WHOLE:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _tile(q, k_ptr, hidden_ptr, best_ptr, row, first, keys, base, mass, scale_log2,
          D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, COUNT: tl.constexpr,
          SOFTMAX: tl.constexpr, TMA: tl.constexpr, WHOLE: tl.constexpr,
          HAS_HIDDEN: tl.constexpr):  # fmt: skip
    """Keeps the highest scores of a tile of keys, and takes it into the highest score of the row
    so far and its sum of weights, relative to that."""
    ROWS: tl.constexpr = q.shape[0]
    scores = _tile_scores(q, k_ptr, hidden_ptr, row, first, keys, D, BLOCK_D, BLOCK_N, COUNT,
                          TMA, WHOLE, HAS_HIDDEN)  # fmt: skip
    best = tl.max(tl.reshape(scores, [ROWS, BLOCK_N // COUNT, COUNT]), 2) * scale_log2
    number = first // COUNT + tl.arange(0, BLOCK_N // COUNT)
    at = best_ptr + number[None, :] * ROWS + tl.arange(0, ROWS)[:, None]
    if WHOLE:
        tl.store(at, best)
    else:
        tl.store(at, best, mask=(number < keys // COUNT)[None, :])
    higher = tl.maximum(base, tl.max(best, 1))
    if SOFTMAX:
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        mass *= tl.math.exp2(base - safe)
        mass += tl.sum(tl.math.exp2(scores * scale_log2 - safe[:, None]), 1)
    return higher, mass


@triton.jit
def _hidden_tiles(hidden_ptr, n_blocks, n_tiles, BLOCK_N: tl.constexpr, COUNT: tl.constexpr):
    """From which to which tile of keys some may belong to blocks that are not there."""
    least, most = n_blocks, 0
    for first in range(0, n_blocks, 1024):
        number = first + tl.arange(0, 1024)
        hidden = tl.load(hidden_ptr + number, mask=number < n_blocks, other=0) != 0
        least = tl.minimum(least, tl.min(tl.where(hidden, number, n_blocks)))
        most = tl.maximum(most, tl.max(tl.where(hidden, number + 1, 0)))
    begin = tl.minimum(least * COUNT // BLOCK_N, n_tiles)
    return begin, tl.maximum(tl.minimum(tl.cdiv(most * COUNT, BLOCK_N), n_tiles), begin)


@triton.jit
def _importance_fwd(
    q_ptr, k_ptr, hidden_ptr, best_ptr, importance_ptr,
    hidden_stride_b, n_heads, n_blocks, n_tiles, best_stride, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    COUNT: tl.constexpr, CHUNK: tl.constexpr, SOFTMAX: tl.constexpr,
    TMA: tl.constexpr, WHOLE: tl.constexpr, HAS_HIDDEN: tl.constexpr,
):  # fmt: skip
    """Tiles of some query blocks against all key blocks, one tile after another.

    A weight needs the base of its query, which is known at the end of the row: until then a program
    keeps the highest score of every query and key block in memory of its own, `[n, ROWS]`.

    TMA: keys through a descriptor. WHOLE: no tile of keys reaches behind the last one.
    """
    keys = n_blocks * COUNT
    per_head = tl.cdiv(keys, ROWS)
    nth = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    best_ptr += tl.program_id(0).to(tl.int64) * best_stride
    for work in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        tile = work % per_head
        entry = (work // per_head).to(tl.int64)
        hidden_at = hidden_ptr + work // per_head // n_heads * hidden_stride_b
        rows = tile * ROWS + nth
        ptrs = q_ptr + (entry * keys + rows)[:, None] * D + cols[None, :]
        q = tl.load(ptrs, mask=(rows < keys)[:, None] & (cols < D)[None, :], other=0.0)

        base = tl.full([ROWS], float("-inf"), tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        row = work // per_head * keys
        if TMA:
            # A mask in the loop costs registers, and with them one of three programs on a
            # multiprocessor [sm_90]: tiles that need one come last.
            n_whole = keys // BLOCK_N
            begin, end = n_whole, n_whole
            if HAS_HIDDEN:
                begin, end = _hidden_tiles(hidden_at, n_blocks, n_whole, BLOCK_N, COUNT)
            for turn in range(n_whole - (end - begin)):
                first = (turn + tl.where(turn < begin, 0, end - begin)) * BLOCK_N
                base, mass = _tile(q, k_ptr, hidden_at, best_ptr, row, first, keys, base, mass,
                                   scale_log2, D, BLOCK_D, BLOCK_N, COUNT, SOFTMAX, True, True,
                                   False)  # fmt: skip
            if HAS_HIDDEN:
                for turn in tl.range(0, end - begin + (1 - WHOLE), num_stages=1):
                    first = tl.where(turn < end - begin, begin + turn, n_whole) * BLOCK_N
                    base, mass = _tile(q, k_ptr, hidden_at, best_ptr, row, first, keys, base, mass,
                                       scale_log2, D, BLOCK_D, BLOCK_N, COUNT, SOFTMAX, True, False,
                                       True)  # fmt: skip
            elif not WHOLE:
                first = n_whole * BLOCK_N
                base, mass = _tile(q, k_ptr, hidden_at, best_ptr, row, first, keys, base, mass,
                                   scale_log2, D, BLOCK_D, BLOCK_N, COUNT, SOFTMAX, True, False,
                                   False)  # fmt: skip
        else:  # a tile apart would take the registers of a second program [sm_80]
            for first in range(0, keys, BLOCK_N):
                base, mass = _tile(q, k_ptr, hidden_at, best_ptr, row, first, keys, base, mass,
                                   scale_log2, D, BLOCK_D, BLOCK_N, COUNT, SOFTMAX, False, WHOLE,
                                   HAS_HIDDEN)  # fmt: skip
        if SOFTMAX:
            base += tl.math.log2(tl.where(mass == 0.0, 1.0, mass))
        base = tl.where(base == float("-inf"), 0.0, base)

        tl.debug_barrier()  # the scores are read by other threads than wrote them
        block_rows = tile * (ROWS // COUNT) + tl.arange(0, ROWS // COUNT)
        for first in range(0, n_blocks, CHUNK):
            number = first + tl.arange(0, CHUNK)
            at = best_ptr + number[None, :] * ROWS + nth[:, None]
            best = tl.load(at, mask=(number < n_blocks)[None, :], other=float("-inf"))
            weight = tl.math.exp2(best - base[:, None])
            weight = tl.max(tl.reshape(weight, [ROWS // COUNT, COUNT, CHUNK]), 1)
            at = (entry * n_blocks + block_rows)[:, None] * n_blocks + number[None, :]
            inside = (block_rows < n_blocks)[:, None] & (number < n_blocks)[None, :]
            tl.store(importance_ptr + at, weight, mask=inside)
        tl.debug_barrier()
