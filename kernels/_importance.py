"""Highest weights between sampled queries and keys of block pairs. Launched by `importance.py`."""

import triton
import triton.language as tl


@triton.jit
def _tile_scores(q, k_ptr, hidden_ptr, first, keys, scale_log2, D: tl.constexpr,
                 BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, COUNT: tl.constexpr,
                 HAS_HIDDEN: tl.constexpr):  # fmt: skip
    """Scores against the sampled keys `first .. first + BLOCK_N`, -inf for those unseen."""
    cols = tl.arange(0, BLOCK_D)
    number = first + tl.arange(0, BLOCK_N)
    inside = number < keys
    ptrs = k_ptr + number.to(tl.int64)[:, None] * D + cols[None, :]
    k = tl.load(ptrs, mask=inside[:, None] & (cols < D)[None, :], other=0.0)
    if HAS_HIDDEN:
        inside = inside & (tl.load(hidden_ptr + number // COUNT, mask=inside, other=1) == 0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    return tl.where(inside[None, :], scores, float("-inf"))


@triton.jit
def _importance_fwd(
    q_ptr, k_ptr, hidden_ptr, importance_ptr, hidden_stride_b, n_heads, n_blocks, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    COUNT: tl.constexpr, SOFTMAX: tl.constexpr, HAS_HIDDEN: tl.constexpr,
):  # fmt: skip
    """Some query blocks against all key blocks, twice: for every query's base, then for weights.

    Scores are cheaper to form again than to keep.
    """
    tiles = tl.cdiv(n_blocks * COUNT, ROWS)
    pid = tl.program_id(0)
    tile = pid % tiles
    entry = (pid // tiles).to(tl.int64)
    batch = pid // tiles // n_heads
    keys = n_blocks * COUNT
    q_ptr += entry * keys * D
    k_ptr += entry * keys * D
    hidden_ptr += batch * hidden_stride_b
    rows = tile * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    ptrs = q_ptr + rows.to(tl.int64)[:, None] * D + cols[None, :]
    row_inside = rows < keys
    q = tl.load(ptrs, mask=row_inside[:, None] & (cols < D)[None, :], other=0.0)

    base = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    for first in range(0, keys, BLOCK_N):
        scores = _tile_scores(q, k_ptr, hidden_ptr, first, keys, scale_log2,
                              D, BLOCK_D, BLOCK_N, COUNT, HAS_HIDDEN)  # fmt: skip
        higher = tl.maximum(base, tl.max(scores, 1))
        if SOFTMAX:
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            mass *= tl.math.exp2(base - safe)
            mass += tl.sum(tl.math.exp2(scores - safe[:, None]), 1)
        base = higher
    if SOFTMAX:
        base += tl.math.log2(tl.where(mass == 0.0, 1.0, mass))
    base = tl.where(base == float("-inf"), 0.0, base)

    block_rows = tile * (ROWS // COUNT) + tl.arange(0, ROWS // COUNT)
    importance_ptr += entry * n_blocks * n_blocks
    for first in range(0, keys, BLOCK_N):
        scores = _tile_scores(q, k_ptr, hidden_ptr, first, keys, scale_log2,
                              D, BLOCK_D, BLOCK_N, COUNT, HAS_HIDDEN)  # fmt: skip
        best = tl.max(tl.reshape(scores, [ROWS, BLOCK_N // COUNT, COUNT]), 2)
        weight = tl.math.exp2(best - base[:, None])
        weight = tl.reshape(weight, [ROWS // COUNT, COUNT, BLOCK_N // COUNT])
        block_cols = first // COUNT + tl.arange(0, BLOCK_N // COUNT)
        at = block_rows[:, None] * n_blocks + block_cols[None, :]
        inside = (block_rows < n_blocks)[:, None] & (block_cols < n_blocks)[None, :]
        tl.store(importance_ptr + at, tl.max(weight, 1), mask=inside)
