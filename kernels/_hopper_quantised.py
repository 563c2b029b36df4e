"""Block-sparse attention forward for Hopper in 8 bits. Launched by `hopper_quantised.py`.

The loop of `_hopper.py`, with scores and, where V_8BIT, values from 8-bit products. Keys and
queries stand in whole blocks, short ones padded; so do values in 8 bits, each block transposed, as
the product with them wants it.

Where all is e4m3, an exponential takes the special-function unit as long as its products take the
matrix unit, so none is computed: scores are added in float16, which holds them as they are scaled,
and the bits of weights are made of them two at a time. Straight lines between powers of two are off
by 2 % (3.9 at most), rounding to e4m3 by 2.6 %; a square in their place took back two thirds of the
time that was won.
"""

import triton
import triton.language as tl

from dit_sparse.kernels._hopper import _forget_stale_barriers, _place, _queued
from dit_sparse.kernels._weight_bits import (
    _greatest,
    _mass_of_pairs,
    _nothing,
    _packed,
    _packed_pairs,
    _unpacked,
    _weights,
)


@triton.jit
def _begun(queue_ptr, n_programs, n_outer, first_inner, n_heads, QUEUED: tl.constexpr):
    """Query block, head and batch entry of a program, counting those that the launch has."""
    if QUEUED:
        block, head, batch = _queued(queue_ptr, tl.program_id(0), n_programs, n_heads)
    else:
        block, head, batch = _place(n_programs, n_outer, first_inner, n_heads)
    return block, head, batch


@triton.jit
def _list(offsets_ptr, full_ptr, partial_ptr, row, PARTIAL: tl.constexpr):
    """Where the full or the partial entries of a query block begin, and how many they are."""
    first = tl.load(offsets_ptr + row)
    steps = tl.load(full_ptr + row)
    if PARTIAL:
        first += steps
        steps = tl.load(partial_ptr + row)
    return first, steps


@triton.jit
def _sides(lower_ptr, upper_ptr, head, stride_h, rows, n_rows, guard):
    """Sides of the boxes of some rows of a head."""
    at = head.to(tl.int64) * stride_h + rows
    inside = rows < n_rows
    lower = tl.load(lower_ptr + at, mask=inside, other=0)
    return lower, tl.load(upper_ptr + at, mask=inside, other=0) | guard


@triton.jit
def _boxed(scores, factor, above_desc, below_desc, number, lower, upper, guard):
    """Scores of a block of keys, with -inf for those outside the boxes of their rows."""
    above = above_desc.load([number, 0]).reshape(scores.shape[1])
    below = below_desc.load([number, 0]).reshape(scores.shape[1])
    inside = ((above | guard)[None, :] - lower[:, None]) & (upper[:, None] - below[None, :])
    return tl.where((inside & guard) == guard, scores * factor, float("-inf"))


@triton.jit
def _mass(p, length, SHORT: tl.constexpr):
    """Sums of the weights of each row.

    A short block ends in copies of its last key, whose values are 0: no maximum and no product sees
    them. All but one are taken from the sum again by the last column, which is one of them: that
    costs less than a mask. It is picked in integers, whose sum with 0 the compiler leaves out.
    """
    mass = tl.sum(p, 1)
    if SHORT:
        last: tl.constexpr = p.shape[1] - 1
        picked = tl.arange(0, last + 1)[None, :] == last
        copy = tl.sum(tl.where(picked, p.to(tl.int32, bitcast=True), 0), 1)
        mass += copy.to(tl.float32, bitcast=True) * (length - (last + 1)).to(tl.float32)
    return mass


@triton.jit
def _by_lines(scores, factor, m_i, l_i, length, TOP: tl.constexpr, TICKS: tl.constexpr,
              RAGGED: tl.constexpr):  # fmt: skip
    """The step of a softmax: maxima in ticks, sums, what those before shrink by, and weights in the
    bits of every fourth.

    From 1024 on numbers of float16 are 1 apart, and its exponent for 1 is 15.
    """
    ORIGIN: tl.constexpr = 1024.0 + 15 * 32
    top = tl.math.ceil(_greatest(scores) * factor) - TOP * TICKS
    m_new = tl.maximum(m_i, top, propagate_nan=tl.PropagateNan.ALL)
    origin = (ORIGIN - m_new).to(tl.float16).to(tl.float32)
    m_new = ORIGIN - origin  # the same but for what float16 rounds
    pairs = _weights(scores, factor, origin)
    alpha = tl.math.exp2((m_i - m_new) * (1 / TICKS))
    l_i = l_i * alpha + _mass_of_pairs(pairs, length, RAGGED)
    return m_new, l_i, alpha, _packed_pairs(pairs)


@triton.jit
def _by_exponential(
    scores, factor, m_i, l_i, within, length, TOP: tl.constexpr,
    RAGGED: tl.constexpr, PARTIAL: tl.constexpr, V_8BIT: tl.constexpr,
):  # fmt: skip
    """`_by_lines`, with maxima that are powers of two and weights in float32."""
    if PARTIAL or (RAGGED and not V_8BIT):
        if not PARTIAL:  # a column bias rides on the scaling, a select would not
            bias = tl.where(within < length, 0.0, float("-inf"))
            scores = scores * factor + bias[None, :]
        # A row that has seen no key yet gets a finite maximum, so that no NaN arises.
        m_new = tl.maximum(tl.maximum(m_i, tl.max(scores, 1) - TOP), -1e30)
        p = tl.math.exp2(scores - m_new[:, None])
    else:
        m_new = tl.maximum(m_i, tl.max(scores, 1) * factor - TOP)
        p = tl.math.exp2(scores * factor - m_new[:, None])
    alpha = tl.math.exp2(m_i - m_new)
    return m_new, l_i * alpha + _mass(p, length, RAGGED and V_8BIT and not PARTIAL), alpha, p


@triton.jit
def _last_product(
    acc, behind, v_desc, indices_ptr, starts_ptr, steps, v_row, v_col,
    BLOCK_D: tl.constexpr, V_8BIT: tl.constexpr,
):  # fmt: skip
    """Adds the values of the last entry, if there is one."""
    last = tl.maximum(steps - 1, 0)
    if V_8BIT:
        number = tl.load(indices_ptr + last, mask=steps > 0, other=0)
        v = v_desc.load([v_row + number * BLOCK_D, 0])
        acc = tl.dot(_unpacked(behind).to(v.dtype, bitcast=True), tl.trans(v), acc)
    else:
        v = v_desc.load([v_row + tl.load(starts_ptr + last, mask=steps > 0, other=0), v_col])
        acc = tl.dot(behind.to(v.dtype, bitcast=True), v, acc)
    return acc


@triton.jit
def _restored(acc, empty, channels_ptr, excess_ptr, BLOCK_D: tl.constexpr):
    """Sums over values in 8 bits in their own unit, about their own centre."""
    channels = channels_ptr + tl.arange(0, BLOCK_D)
    step = tl.load(channels + 2 * BLOCK_D) * (tl.maximum(tl.load(excess_ptr), 448.0) / 448.0)
    acc = acc * step[None, :]
    centre = tl.load(channels + BLOCK_D)[None, :]
    return acc + tl.where(empty, 0.0, 1.0)[:, None] * centre


@triton.jit
def _merged(acc, m_i, empty, out_ptrs, out_inside, lse_ptrs, row_inside):
    """With the result so far, as if that were one more key of each row."""
    before = tl.load(lse_ptrs, mask=row_inside, other=float("-inf")) * 1.4426950408889634
    m_i = tl.where(empty, float("-inf"), m_i)
    m_new = tl.maximum(tl.maximum(m_i, before), -1e30)
    share = tl.math.exp2(m_i - m_new)
    weight = tl.math.exp2(before - m_new)
    both = share + weight
    empty = both == 0.0
    both_safe = tl.where(empty, 1.0, both)
    acc = acc * (share / both_safe)[:, None]
    earlier = tl.load(out_ptrs, mask=out_inside, other=0.0).to(tl.float32)
    acc += (weight / both_safe)[:, None] * earlier
    return acc, m_new + tl.math.log2(both_safe), empty


@triton.jit(do_not_specialize=["n_outer", "first_inner"])  # compiled once for all of them
def _quantised_fwd_hopper(
    q_ptr, k_desc, v_desc, above_desc, below_desc, out_ptr, lse_ptr,
    q_step_ptr, k_step_ptr, centres_ptr, excess_ptr, shift_ptr,
    offsets_ptr, full_ptr, partial_ptr, indices_ptr, starts_ptr, lengths_ptr,
    q_starts_ptr, rows_ptr, order_ptr, queue_ptr, lower_ptr, upper_ptr,
    q_rows, k_rows,
    v_row_b, v_row_h, v_col_h,
    out_stride_b, out_stride_h, out_stride_n,
    list_stride_b, list_stride_h, order_stride_h, box_stride_h,
    n_heads, n_q_blocks, n_programs, n_outer, first_inner, n_k_blocks, n_queries, scale_log2, guard,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RAGGED: tl.constexpr, HAS_ORDER: tl.constexpr, PARTIAL: tl.constexpr,
    V_8BIT: tl.constexpr, FRESH: tl.constexpr, QUEUED: tl.constexpr,
):  # fmt: skip
    block, head, batch = _begun(queue_ptr, n_programs, n_outer, first_inner, n_heads, QUEUED)
    if PARTIAL:
        block = tl.load(rows_ptr + block)
    pair = batch * n_heads + head
    q_block = pair * n_q_blocks + block

    q_desc = tl.make_tensor_descriptor(
        q_ptr, shape=[q_rows, BLOCK_D], strides=[BLOCK_D, 1], block_shape=[BLOCK_M, BLOCK_D]
    )
    q = q_desc.load([q_block * BLOCK_M + _forget_stale_barriers(), 0])
    q_step = tl.load(q_step_ptr + q_block) * scale_log2
    k_row = pair * k_rows
    k_step_ptr += pair * n_k_blocks
    v_row = batch * v_row_b + head * v_row_h
    v_col = head * v_col_h

    row = batch * list_stride_b + head * list_stride_h + block
    first, steps = _list(offsets_ptr, full_ptr, partial_ptr, row, PARTIAL)
    indices_ptr += first
    starts_ptr += first
    lengths_ptr += first
    within = tl.arange(0, BLOCK_N)

    q_start = tl.load(q_starts_ptr + block)
    if PARTIAL:
        box_rows = q_start + tl.arange(0, BLOCK_M)
        lower, upper = _sides(lower_ptr, upper_ptr, head, box_stride_h, box_rows, n_queries, guard)
    HALF: tl.constexpr = FRESH and q_ptr.dtype.element_ty == tl.float8e4nv
    TICKS: tl.constexpr = 32.0  # of a power of two, in which maxima are then
    # Of 448, which e4m3 holds, weights use 2^8, or 2^8.75 of lines: its small numbers are coarse.
    TOP: tl.constexpr = 8.75 if HALF else 8.0 if V_8BIT else 0.0
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    alpha = tl.full([BLOCK_M], 1.0, tl.float32)
    alpha_before = tl.full([BLOCK_M], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if FRESH:
        fresh = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # The weights of the block before, as bits: a loop-carried tile of a float type would be sent
    # through shared memory, and the product with it waited for.
    behind = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if V_8BIT else tl.int16)

    for it in tl.range(0, steps, warp_specialize=True):
        number = tl.load(indices_ptr + it)
        k = k_desc.load([k_row + number * BLOCK_N, 0])
        # What the softmax needs from memory is loaded before the product with v: a load behind it
        # waits for it, and so does all that depends on the load.
        factor = q_step * tl.load(k_step_ptr + number)
        length = BLOCK_N
        if RAGGED and not PARTIAL:
            length = tl.load(lengths_ptr + it)
        if HALF:
            # At most 1, so that float16 holds what follows: scores beyond 1,200 are too small then,
            # which rounding to 8 bits has made uncertain by a factor of 50 anyway.
            factor = tl.minimum(factor * TICKS, 1.0).to(tl.float16).to(tl.float32)
            scores = tl.dot(q, tl.trans(k), out_dtype=tl.float16)
        else:
            scores = tl.dot(q, tl.trans(k)).to(tl.float32)
        if PARTIAL:
            scores = _boxed(scores, factor, above_desc, below_desc, number, lower, upper, guard)
        at = tl.maximum(it - 1, 0)
        if V_8BIT:
            v = v_desc.load([v_row + tl.load(indices_ptr + at) * BLOCK_D, 0])
            p8 = _unpacked(behind).to(v.dtype, bitcast=True)
            if FRESH:
                acc = acc * alpha_before[:, None] + fresh
                fresh = tl.dot(p8, tl.trans(v), _nothing(acc))
            else:
                acc = acc * alpha[:, None]
                acc = tl.dot(p8, tl.trans(v), acc)
        else:
            v = v_desc.load([v_row + tl.load(starts_ptr + at), v_col])
            acc = acc * alpha[:, None]
            acc = tl.dot(behind.to(v.dtype, bitcast=True), v, acc)
        alpha_before = alpha
        if HALF:
            m_i, l_i, alpha, behind = _by_lines(
                scores, factor, m_i, l_i, length, TOP, TICKS, RAGGED
            )
        else:
            m_i, l_i, alpha, p = _by_exponential(
                scores, factor, m_i, l_i, within, length, TOP, RAGGED, PARTIAL, V_8BIT
            )
            behind = _packed(p) if V_8BIT else p.to(v.dtype).to(tl.int16, bitcast=True)

    if FRESH:
        acc = acc * alpha_before[:, None] + fresh
    acc = _last_product(
        acc * alpha[:, None], behind, v_desc, indices_ptr, starts_ptr, steps, v_row, v_col,
        BLOCK_D, V_8BIT,
    )  # fmt: skip

    rows = q_start + tl.arange(0, BLOCK_M)
    row_inside = rows < tl.load(q_starts_ptr + block + 1)
    tokens = rows.to(tl.int64)
    if HAS_ORDER:
        tokens = tl.load(order_ptr + head * order_stride_h + rows, mask=row_inside, other=0)
    cols = tl.arange(0, BLOCK_D)
    empty = l_i == 0.0
    l_safe = tl.where(empty, 1.0, l_i)
    acc = tl.where(empty[:, None], 0.0, acc / l_safe[:, None])  # a weight of 0 hides no NaN
    if V_8BIT:
        acc = _restored(acc, empty, centres_ptr + pair * 3 * BLOCK_D, excess_ptr + pair, BLOCK_D)
    if HALF:
        m_i = m_i * (1 / TICKS) - 0.0565  # what lines are above the exponential in the mean
    m_i += tl.math.log2(l_safe)
    # What all scores of the row lost with the mean key.
    # Triton moves the row of `q_desc.load` for its second half: nothing else may be made of it.
    shift_ptr += pair.to(tl.int64) * n_queries
    m_i += tl.load(shift_ptr + rows, mask=row_inside, other=0.0) * scale_log2
    out_ptr += batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    out_ptrs = out_ptr + tokens[:, None] * out_stride_n + cols[None, :]
    out_inside = row_inside[:, None] & (cols[None, :] < D)
    lse_ptr += (batch.to(tl.int64) * n_heads + head) * n_queries
    if PARTIAL:
        merged = _merged(acc, m_i, empty, out_ptrs, out_inside, lse_ptr + tokens, row_inside)
        acc, m_i, empty = merged
    lse = tl.where(empty, float("-inf"), m_i * 0.6931471805599453)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=out_inside)
    tl.store(lse_ptr + tokens, lse, mask=row_inside)
