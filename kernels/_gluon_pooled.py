"""Pooled entries added to the result for exact ones, for Hopper in Gluon.

As `_hopper_gluon.py`: persistent, a warp that fetches, two warpgroups with 64 queries each, values
one step behind. Tiles of pooled rows lie in shared memory as one block of 128 keys, so that a step
has the products of an exact entry, however small they are.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from dit_sparse.kernels._gluon_fetch import ROWS, _next, _tile, _turns
from dit_sparse.kernels._gluon_rows import _limits, _stored, _tokens
from dit_sparse.kernels._gluon_tiles import (
    BLOCK_N,
    _entries,
    _pooled_work,
    _produce_pooled,
    _steps_of,
)
from dit_sparse.kernels._hopper_gluon import _barriers, _products, _room, _scores, _sums


@gluon.jit
def _bias(entry, MOST: gl.constexpr, SHORT: gl.constexpr):
    """log2 of the tokens that a row of a tile stands for; of a tile without, too little."""
    bias = gl.minimum((entry >> 8) & 7, MOST).to(gl.float32)
    if SHORT:
        return bias
    return gl.where((entry & 255) == 0, -1e30, bias)


@gluon.jit
def _rows(entry, MOST: gl.constexpr):
    """How many rows of a tile have tokens, the last of them maybe a part."""
    return (entry & 255).to(gl.float32) * gl.exp2(-_bias(entry, MOST, True))


@gluon.jit
def _by_tile(key, parts, KEYS: gl.constexpr):
    """For every key what its tile has."""
    found = gl.where(key < KEYS, parts[0], parts[1])
    for n in gl.static_range(2, BLOCK_N // KEYS):
        found = gl.where(key < n * KEYS, found, parts[n])
    return found


@gluon.jit
def _pooled_weights(
    scores, m_i, entries, scale_log2, dtype: gl.constexpr, of_p: gl.constexpr,
    KEYS: gl.constexpr, MOST: gl.constexpr, SHORT: gl.constexpr, BOUND: gl.constexpr,
):  # fmt: skip
    """As `_weighed`: the weight of a row is that of all its tokens.

    SHORT: whether tiles have rows without tokens, or with a part of them, at their end. Rows that
    repeat others get tokens one after the other, which is all the same in their sum.
    """
    if not BOUND:
        # No row raises the maximum that has no weight: all repeat rows that have one. Weights
        # reach above 1 by what rows count.
        m_i = gl.maximum(m_i, gl.max(scores, 1) * scale_log2)
    TILES: gl.constexpr = BLOCK_N // KEYS
    key = gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores.type.layout))
    biases = ()
    for n in gl.static_range(TILES):
        biases = biases + (_bias(entries[n], MOST, SHORT),)  # noqa: RUF005
    bias = gl.expand_dims(_by_tile(key, biases, KEYS), 0)
    p = gl.exp2(scores * scale_log2 - (gl.expand_dims(m_i, 1) - bias))
    if SHORT:
        rows = ()
        for n in gl.static_range(TILES):
            rows = rows + (_rows(entries[n], MOST),)  # noqa: RUF005
        rows = _by_tile(key, rows, KEYS)
        share = gl.minimum(gl.maximum(rows - (key % KEYS).to(gl.float32), 0.0), 1.0)
        p *= gl.expand_dims(share, 0)
    return gl.convert_layout(p.to(dtype), of_p), gl.sum(p, 1), m_i


@gluon.jit
def _go_on(
    sums, m_i, l_i, count, tokens, rows, row_inside, outs, out_stride_n, lses, agains,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BOUND: gl.constexpr,
):  # fmt: skip
    """Writes the result of some rows: what was there, as if it were one more key, and the sums."""
    read = row_inside & (count > 0)
    before = gl.load(lses + tokens, mask=read, other=float("-inf")) * 1.4426950408889634
    # Whether sums in units of the bound are what they should be. What fell below the least number
    # is too little to count where so much is left, or where the row has so much already. A mean
    # that was rounded up may be above the bound. No number is not to be trusted.
    trusted = ((l_i >= 2.6e-26) | (before >= m_i - 64.0)) & (l_i <= 1e18)
    m_new = gl.maximum(gl.maximum(m_i, before), -1e30)
    alpha, weight = gl.exp2(m_i - m_new), gl.exp2(before - m_new)
    total = l_i * alpha + weight
    empty = total == 0.0
    safe = gl.where(empty, 1.0, total)
    lse = gl.where(empty, float("-inf"), (m_new + gl.log2(safe)) * 0.6931471805599453)
    if BOUND:
        again = gl.where(trusted | (count == 0), 0, 1).to(gl.int8)
        gl.store(agains + rows, again, mask=row_inside)
        read = read & trusted
    gl.store(lses + tokens, lse, mask=read)

    by_row: gl.constexpr = gl.SliceLayout(1, sums.type.layout)
    sums = sums * gl.expand_dims(gl.convert_layout(alpha / safe, by_row), 1)
    # A weight of 0 hides no NaN.
    nothing = gl.expand_dims(gl.convert_layout(l_i == 0.0, by_row), 1)
    stored: gl.constexpr = _stored(BLOCK_D)
    by_stored_row: gl.constexpr = gl.SliceLayout(1, stored)
    cols = gl.expand_dims(gl.arange(0, BLOCK_D, gl.SliceLayout(0, stored)), 0)
    to = outs + gl.expand_dims(gl.convert_layout(tokens, by_stored_row), 1) * out_stride_n + cols
    inside = gl.expand_dims(gl.convert_layout(read, by_stored_row), 1) & (cols < D)
    old = gl.load(to, mask=inside, other=0.0).to(gl.float32)
    old *= gl.expand_dims(gl.convert_layout(weight / safe, by_stored_row), 1)
    both = gl.convert_layout(gl.where(nothing, 0.0, sums), stored) + old
    gl.store(to, both.to(outs.dtype.element_ty), mask=inside)


@gluon.jit
def _twice(tile):
    """In the place of a tile and of that of a mask, which is not read."""
    return tile, tile


@gluon.jit
def _pooled_step(
    rings, q, places, state, nothing, more, listed, step, whole, count, scale_log2,
    of_p: gl.constexpr, by_out_row: gl.constexpr,
    KEYS: gl.constexpr, MOST: gl.constexpr, SHORT: gl.constexpr, BOUND: gl.constexpr,
):  # fmt: skip
    """Products of a step's keys, and of the values of the one before."""
    _, _, k_room, k_full, v_room, v_full, done = rings
    TILES: gl.constexpr = BLOCK_N // KEYS
    k_slot, k_phase, v_slot, v_phase = places
    acc, behind, alpha, m_i, l_i = state
    mbarrier.wait(k_full.index(k_slot), k_phase)
    scores, acc = _products(
        q, _twice(k_room.index(k_slot)), 0, behind, v_room.index(v_slot), v_full.index(v_slot),
        v_phase, acc, gl.convert_layout(alpha, by_out_row), more, nothing, BOUND, 0,
    )  # fmt: skip
    entries = _entries(listed, step, whole, count, TILES)
    scores = hopper.warpgroup_mma_wait(1, [scores])
    mbarrier.arrive(done.index(k_slot))
    weights, mass, m_new = _pooled_weights(
        scores, m_i, entries, scale_log2, v_room.dtype, of_p, KEYS, MOST, SHORT, BOUND
    )
    if not BOUND:
        alpha = gl.exp2(m_i - m_new)
        l_i = l_i * alpha
        m_i = m_new
    l_i += mass
    acc = _sums(acc, behind, v_full.index(v_slot), v_phase)
    k_slot, k_phase = _next(k_slot, k_phase, k_room.shape[0])
    v_slot, v_phase = _next(v_slot, v_phase, v_room.shape[0])
    return (k_slot, k_phase, v_slot, v_phase), (acc, weights, alpha, m_i, l_i)


@gluon.jit
def _consume_pooled(
    rings, pointers, lists, strides, sizes, scale_log2,
    HALF: gl.constexpr, D: gl.constexpr, BLOCK_D: gl.constexpr, KEYS: gl.constexpr,
    EACH: gl.constexpr, MOST: gl.constexpr,
    RAGGED: gl.constexpr, HAS_ORDER: gl.constexpr, BOUND: gl.constexpr,
):  # fmt: skip
    """As `_consume`, of tiles of pooled rows, on top of what is there."""
    q_room, q_full, k_room, k_full, v_room, v_full, done = rings
    out_ptr, lse_ptr, norm_ptr, longest_ptr, again_ptr, order_ptr = pointers
    any_ptr, _, _, _, _ = lists
    out_stride_b, out_stride_h, out_stride_n, list_stride_b, list_stride_h, order_stride_h = strides
    n_tiles, n_heads, n_q_blocks, n_queries = sizes
    Q_SLOTS: gl.constexpr = q_room.shape[0] // 2
    SLOTS: gl.constexpr = k_room.shape[0]
    V_SLOTS: gl.constexpr = v_room.shape[0]
    TILES: gl.constexpr = BLOCK_N // KEYS
    by_list, of_heads = (list_stride_b, list_stride_h), (n_heads, n_q_blocks)

    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    of_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    of_p: gl.constexpr = gl.DotOperandLayout(0, of_out, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, of_scores)
    by_out_row: gl.constexpr = gl.SliceLayout(1, of_out)
    within = gl.arange(0, ROWS, by_row) + HALF * ROWS
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, of_scores)
    none = gl.zeros([ROWS, BLOCK_D], gl.float32, of_out)
    alpha = gl.full([ROWS], 1.0, gl.float32, by_row)
    bounds = (norm_ptr, longest_ptr, n_heads, n_queries, scale_log2, -1e25)

    tile = _tile(any_ptr, 0, n_tiles, False)
    head, batch, listed, whole, count, q_start, q_end = _pooled_work(
        tile, lists, by_list, of_heads, EACH
    )
    q_slot, q_phase = 0, 0
    # The first tile is begun here, all others before the one before them is written.
    m_i = _limits(bounds, batch, head, q_start, within, 0.0, BOUND, False)
    entries = _entries(listed, 0, whole, count, TILES)
    mbarrier.wait(k_full.index(0), 0)
    mbarrier.wait(q_full.index(HALF), 0)
    scores = _scores(_twice(q_room.index(HALF)), _twice(k_room.index(0)), 0, nothing, 0)
    scores = hopper.warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(done.index(0))
    behind, l_i, m_i = _pooled_weights(
        scores, m_i, entries, scale_log2, v_room.dtype, of_p, KEYS, MOST, False, BOUND
    )
    places = (1, 0, 0, 0)  # slots of keys and of values, and their phases

    for turn in range(_turns(any_ptr, n_tiles, False)):
        # Loads whose results are needed when this tile is written, or by the next one.
        rows = q_start + within
        row_inside = rows < q_end
        tokens = _tokens(order_ptr + head * order_stride_h, rows, row_inside, HAS_ORDER)
        tile = _tile(any_ptr, turn + 1, n_tiles, False)
        head_1, batch_1, listed_1, whole_1, count_1, q_start_1, q_end_1 = _pooled_work(
            tile, lists, by_list, of_heads, EACH
        )
        m_1 = _limits(bounds, batch_1, head_1, q_start_1, within, 0.0, BOUND, False)

        steps = _steps_of(whole, count, TILES)[1]
        q = _twice(q_room.index(q_slot * 2 + HALF))
        state = (none, behind, alpha, m_i, l_i)
        for it in range(1, steps):
            places, state = _pooled_step(
                rings, q, places, state, nothing, it > 1, listed, it, whole, count, scale_log2,
                of_p, by_out_row, KEYS, MOST, RAGGED, BOUND,
            )  # fmt: skip
        acc, behind, alpha, m_i, l_i = state

        # The last product of this tile runs under the first exponentials of the next one.
        k_slot, k_phase, v_slot, v_phase = places
        q_slot, q_phase = _next(q_slot, q_phase, Q_SLOTS)
        mbarrier.wait(k_full.index(k_slot), k_phase)
        mbarrier.wait(q_full.index(q_slot * 2 + HALF), q_phase)
        scores, acc = _products(
            _twice(q_room.index(q_slot * 2 + HALF)), _twice(k_room.index(k_slot)), 0, behind,
            v_room.index(v_slot), v_full.index(v_slot), v_phase, acc,
            gl.convert_layout(alpha, by_out_row), steps > 1, nothing, BOUND, 0,
        )  # fmt: skip
        entries = _entries(listed_1, 0, whole_1, count_1, TILES)
        scores = hopper.warpgroup_mma_wait(1, [scores])
        mbarrier.arrive(done.index(k_slot))
        weights, l_1, m_1 = _pooled_weights(
            scores, m_1, entries, scale_log2, v_room.dtype, of_p, KEYS, MOST, False, BOUND
        )
        result = _sums(acc, behind, v_full.index(v_slot), v_phase)
        behind = weights
        k_slot, k_phase = _next(k_slot, k_phase, SLOTS)
        v_slot, v_phase = _next(v_slot, v_phase, V_SLOTS)
        places = (k_slot, k_phase, v_slot, v_phase)
        pair = batch.to(gl.int64) * n_heads + head
        _go_on(
            result, m_i, l_i, count, tokens, rows, row_inside,
            out_ptr + batch.to(gl.int64) * out_stride_b + head.to(gl.int64) * out_stride_h,
            out_stride_n, lse_ptr + pair * n_queries, again_ptr + pair * n_queries,
            D, BLOCK_D, BOUND,
        )  # fmt: skip
        m_i, l_i = m_1, l_1
        head, batch, listed, whole, count = head_1, batch_1, listed_1, whole_1, count_1
        q_start, q_end = q_start_1, q_end_1


@gluon.jit
def _block_room(desc, SLOTS: gl.constexpr):
    """Slots for the tiles of a step."""
    block: gl.constexpr = [SLOTS, BLOCK_N, desc.block_shape[1]]
    return gl.allocate_shared_memory(desc.dtype, block, desc.layout)


@gluon.jit(do_not_specialize=["n_tiles"])
def _pooled_fwd_hopper_gluon(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, norm_ptr, longest_ptr, again_ptr,
    offsets_ptr, wholes_ptr, counts_ptr, entries_ptr, q_starts_ptr, order_ptr,
    q_row_b, q_row_h, q_col_h, rows_of_head, out_stride_b, out_stride_h, out_stride_n,
    list_stride_b, list_stride_h, order_stride_h,
    n_tiles, n_heads, n_q_blocks, n_queries, scale_log2,
    D: gl.constexpr, BLOCK_D: gl.constexpr, KEYS: gl.constexpr, EACH: gl.constexpr,
    MOST: gl.constexpr, RAGGED: gl.constexpr, HAS_ORDER: gl.constexpr,
    BOUND: gl.constexpr,
    Q_SLOTS: gl.constexpr, SLOTS: gl.constexpr, V_SLOTS: gl.constexpr,
):  # fmt: skip
    """Goes on from `out` and `lse`.

    KEYS: rows of a tile. EACH: the most tiles of an entry of the plan. MOST: log2 of the tokens
    that a row stands for where a block fills just a tile.
    BOUND: whether bounds of the scores are subtracted in the place of maxima. Rows that they fail
    are left as they are and marked in `again`.
    """
    q_room = _room(q_desc, 2 * Q_SLOTS)
    k_room, v_room = _block_room(k_desc, SLOTS), _block_room(v_desc, V_SLOTS)
    q_full, k_full, v_full = _barriers(2 * Q_SLOTS, 1), _barriers(SLOTS, 1), _barriers(V_SLOTS, 1)
    done = _barriers(SLOTS, 2)
    hopper.fence_async_shared()
    rings = (q_room, q_full, k_room, k_full, v_room, v_full, done)
    pointers = (out_ptr, lse_ptr, norm_ptr, longest_ptr, again_ptr, order_ptr)
    lists = (offsets_ptr, wholes_ptr, counts_ptr, q_starts_ptr, entries_ptr)
    strides = (
        out_stride_b, out_stride_h, out_stride_n, list_stride_b, list_stride_h, order_stride_h,
    )  # fmt: skip
    sizes = (n_tiles, n_heads, n_q_blocks, n_queries)
    half_0: gl.constexpr = 0
    half_1: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_consume_pooled, (rings, pointers, lists, strides, sizes, scale_log2, half_0,
                               D, BLOCK_D, KEYS, EACH, MOST, RAGGED, HAS_ORDER, BOUND)),
            (_consume_pooled, (rings, pointers, lists, strides, sizes, scale_log2, half_1,
                               D, BLOCK_D, KEYS, EACH, MOST, RAGGED, HAS_ORDER, BOUND)),
            (_produce_pooled, (rings, (q_desc, k_desc, v_desc), lists,
                               (q_row_b, q_row_h, q_col_h, list_stride_b, list_stride_h),
                               (n_tiles, n_heads, n_q_blocks, rows_of_head), EACH)),
        ],
        [4, 1], [232, 40],
    )  # fmt: skip
