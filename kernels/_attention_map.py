"""Sums, maxima and counts of softmax weights of block pairs. Launched by `attention_map.py`."""

import triton
import triton.language as tl


@triton.jit
def _key_span(starts_ptr, hidden_ptr, block, sub, ROWS: tl.constexpr, HAS_HIDDEN: tl.constexpr):
    """First position of a tile of a key block, and the end of the block; empty if it is hidden."""
    start = tl.load(starts_ptr + block)
    stop = tl.load(starts_ptr + block + 1)
    if HAS_HIDDEN:
        stop = tl.where(tl.load(hidden_ptr + block) != 0, start, stop)
    return start + sub * ROWS, stop


@triton.jit
def _key_scores(q, k_ptr, start, stop, stride_n, scale_log2, D: tl.constexpr,
                BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Scores against the keys `start .. start + BLOCK_N`, -inf from `stop` on."""
    cols = tl.arange(0, BLOCK_D)
    positions = start + tl.arange(0, BLOCK_N)
    inside = positions < stop
    ptrs = k_ptr + positions.to(tl.int64)[:, None] * stride_n + cols[None, :]
    k = tl.load(ptrs, mask=inside[:, None] & (cols < D)[None, :], other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    return tl.where(inside[None, :], scores, float("-inf")), inside


@triton.jit
def _attention_map_fwd(
    q_ptr, k_ptr, starts_ptr, hidden_ptr, sums_ptr, maxima_ptr, small_ptr,
    q_stride_h, q_stride_n, k_stride_h, k_stride_n, n_blocks, parts, scale_log2, bound,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SUB: tl.constexpr, HAS_HIDDEN: tl.constexpr,
):  # fmt: skip
    """Part of a query block against all key blocks, twice: for its rows' softmax, then to reduce.

    Scores are cheaper to form again than to keep.
    """
    pid = tl.program_id(0)
    part = pid % parts
    block = (pid // parts) % n_blocks
    head = (pid // parts // n_blocks).to(tl.int64)
    k_ptr += head * k_stride_h
    rows = tl.load(starts_ptr + block) + part * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = rows < tl.load(starts_ptr + block + 1)
    cols = tl.arange(0, BLOCK_D)
    ptrs = q_ptr + head * q_stride_h + rows.to(tl.int64)[:, None] * q_stride_n + cols[None, :]
    q = tl.load(ptrs, mask=row_inside[:, None] & (cols < D)[None, :], other=0.0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(n_blocks * SUB):
        start, stop = _key_span(starts_ptr, hidden_ptr, tile // SUB, tile % SUB,
                                BLOCK_N, HAS_HIDDEN)  # fmt: skip
        scores, _ = _key_scores(q, k_ptr, start, stop, k_stride_n, scale_log2,
                                D, BLOCK_D, BLOCK_N)  # fmt: skip
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        mass *= tl.math.exp2(top - safe)
        mass += tl.sum(tl.math.exp2(scores - safe[:, None]), 1)
        top = higher
    # Divided by the mass, not less its logarithm: that would round where scores are high.
    share = 1.0 / tl.where(mass == 0.0, 1.0, mass)
    top = tl.where(top == float("-inf"), 0.0, top)

    at = (head * n_blocks + block) * parts + part
    for key_block in range(n_blocks):
        total = tl.zeros([BLOCK_M], tl.float32)
        highest = tl.zeros([BLOCK_M], tl.float32)
        small = tl.zeros([BLOCK_M], tl.int32)
        for sub in tl.static_range(SUB):
            start, stop = _key_span(starts_ptr, hidden_ptr, key_block, sub, BLOCK_N, HAS_HIDDEN)
            scores, inside = _key_scores(q, k_ptr, start, stop, k_stride_n, scale_log2,
                                         D, BLOCK_D, BLOCK_N)  # fmt: skip
            weights = tl.math.exp2(scores - top[:, None]) * share[:, None]
            total += tl.sum(weights, 1)
            highest = tl.maximum(highest, tl.max(weights, 1))
            small += tl.sum(((weights < bound) & inside[None, :]).to(tl.int32), 1)
        place = at * n_blocks + key_block
        tl.store(sums_ptr + place, tl.sum(tl.where(row_inside, total, 0.0), 0))
        tl.store(maxima_ptr + place, tl.max(tl.where(row_inside, highest, 0.0), 0))
        tl.store(small_ptr + place, tl.sum(tl.where(row_inside, small, 0), 0).to(tl.float32))
