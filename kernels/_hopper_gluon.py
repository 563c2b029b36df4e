"""Block-sparse attention forward for Hopper in Gluon: persistent, with every barrier our own.

A program for each multiprocessor takes one query block after the other. One warp fetches queries,
keys and values, through the ends of query blocks too; two warpgroups take 64 queries each. They
wait for nothing but what was fetched, so that one starts or ends a query block, or computes
exponentials, while the other multiplies. Products with the values are one key block behind, and run
under the next block's exponentials.

Everything in shared memory is written by the tensor memory accelerator and read by the matrix
units alone, so there is nothing to fence between them. Every barrier has a place of its own for as
long as the kernel runs.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

#: Query rows of one warpgroup.
ROWS = gl.constexpr(64)


@gluon.jit
def _at(turn, n_tiles, QUEUED: gl.constexpr):
    """Which of the tiles a program takes next; any of them behind its last turn.

    Queues begin with the longest rows: turning round evens out what programs get.
    """
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    if QUEUED:
        pid = gl.where(turn % 2 == 0, pid, programs - 1 - pid)
    return gl.minimum(turn * programs + pid, n_tiles - 1)


@gluon.jit
def _turns(n_tiles, QUEUED: gl.constexpr):
    """How many tiles a program takes."""
    programs = gl.num_programs(0)
    last = (n_tiles + programs - 1) // programs - 1
    pid = gl.program_id(0)
    if QUEUED:
        pid = gl.where(last % 2 == 0, pid, programs - 1 - pid)
    return last + gl.where(last * programs + pid < n_tiles, 1, 0)


@gluon.jit
def _tile(queue_ptr, turn, n_tiles, QUEUED: gl.constexpr):
    at = _at(turn, n_tiles, QUEUED)
    if QUEUED:
        at = gl.load(queue_ptr + at)
    return at


@gluon.jit
def _placed(tile, n_tiles, n_q_blocks, n_outer, first_inner, n_heads, QUEUED: gl.constexpr):
    """Query block, head and batch entry of a tile; without a queue as in `_hopper._placed`."""
    if QUEUED:
        pair = tile // n_q_blocks
        return tile % n_q_blocks, pair % n_heads, pair // n_heads
    outer = n_tiles // n_q_blocks * n_outer
    n_inner = n_q_blocks - n_outer
    width = gl.where(tile < outer, n_outer, n_inner)
    number = gl.where(tile < outer, tile, tile - outer)
    pair = number // width
    block = number - pair * width
    skipped = gl.where(block < first_inner, 0, n_inner)
    block += gl.where(tile < outer, skipped, first_inner)
    return block, pair % n_heads, pair // n_heads


@gluon.jit
def _next(slot, phase, SLOTS: gl.constexpr):
    """The slot behind one of a ring, and its phase."""
    if SLOTS == 1:
        return slot, phase ^ 1
    wraps = slot == SLOTS - 1
    return gl.where(wraps, 0, slot + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _wait_done(done, slot, phase, AHEAD: gl.constexpr, SLOTS: gl.constexpr, pred=True):
    """Waits for the product that empties the slot of the keys which are so many ahead of these."""
    for _ in gl.static_range(AHEAD):
        slot, phase = _next(slot, phase, SLOTS)
    mbarrier.wait(done.index(slot), phase ^ 1, pred=pred)


@gluon.jit
def _load(desc, row, col, room, full, slot, pred=True):
    """Loads a tile into a slot of a ring, which must be free."""
    ready = full.index(slot)
    mbarrier.expect(ready, desc.block_type.nbytes, pred=pred)
    tma.async_copy_global_to_shared(desc, [row, col], ready, room.index(slot), pred=pred)


@gluon.jit
def _produce(rings, descs, lists, strides, sizes, QUEUED: gl.constexpr):
    """Fetches everything, in the order in which it is read: keys, and the values of the block
    before, in an earlier tile too.

    One barrier for each slot of keys says that they were multiplied with the queries. By then the
    values of two key blocks before were multiplied too, and the tile before with its queries.
    """
    q_room, q_full, k_room, k_full, v_room, v_full, done = rings
    q_desc, k_desc, v_desc = descs
    offsets_ptr, full_ptr, starts_ptr, q_starts_ptr, queue_ptr = lists
    (
        q_row_b, q_row_h, q_col_h, k_row_b, k_row_h, k_col_h, v_row_b, v_row_h, v_col_h,
        list_stride_b, list_stride_h,
    ) = strides  # fmt: skip
    n_tiles, n_heads, group, n_q_blocks, n_outer, first_inner = sizes
    Q_SLOTS: gl.constexpr = q_room.shape[0] // 2
    SLOTS: gl.constexpr = k_room.shape[0]
    V_SLOTS: gl.constexpr = v_room.shape[0]

    tile = _tile(queue_ptr, 0, n_tiles, QUEUED)
    block, head, batch = _placed(tile, n_tiles, n_q_blocks, n_outer, first_inner, n_heads, QUEUED)
    row = batch * list_stride_b + head * list_stride_h + block
    first = gl.load(offsets_ptr + row)
    steps = gl.load(full_ptr + row)
    q_start = gl.load(q_starts_ptr + block)
    start = gl.load(starts_ptr + first, mask=steps > 0, other=0)
    tile_1 = _tile(queue_ptr, 1, n_tiles, QUEUED)
    block_1, head_1, batch_1 = _placed(
        tile_1, n_tiles, n_q_blocks, n_outer, first_inner, n_heads, QUEUED
    )
    row_1 = batch_1 * list_stride_b + head_1 * list_stride_h + block_1
    first_1 = gl.load(offsets_ptr + row_1)
    steps_1 = gl.load(full_ptr + row_1)
    q_slot = 0
    slot, phase = 0, 0  # of the next keys
    v_slot = 0
    v_row, v_col = 0, 0  # of the block before
    since = 0  # key blocks of the tile before
    turns = _turns(n_tiles, QUEUED)
    for turn in range(turns + 1):
        # What the next two tiles take from memory, each load a whole tile before it is needed.
        q_start_1 = gl.load(q_starts_ptr + block_1)
        start_1 = gl.load(starts_ptr + first_1, mask=steps_1 > 0, other=0)
        tile_2 = _tile(queue_ptr, turn + 2, n_tiles, QUEUED)

        k_head = head // group  # as many heads of q share one of k and v
        k_row = batch * k_row_b + k_head * k_row_h
        k_col = k_head * k_col_h
        _wait_done(done, slot, phase, 0, SLOTS)
        _load(k_desc, k_row + start, k_col, k_room, k_full, slot)
        slot, phase = _next(slot, phase, SLOTS)
        # Where there is room for the queries of two tiles, so many key blocks say that it is free.
        crowded = since < SLOTS - 1 if Q_SLOTS == 2 else True
        _wait_done(done, slot, phase, SLOTS - 2, SLOTS, pred=crowded)
        q_row = batch * q_row_b + head * q_row_h + q_start
        for half in gl.static_range(2):
            _load(q_desc, q_row + half * ROWS, head * q_col_h, q_room, q_full, q_slot * 2 + half)
        if Q_SLOTS == 2:
            q_slot ^= 1
        if V_SLOTS == SLOTS:
            _wait_done(done, slot, phase, 0, SLOTS)
        _load(v_desc, v_row, v_col, v_room, v_full, v_slot, pred=turn > 0)
        if turn > 0:
            v_slot = gl.where(v_slot == V_SLOTS - 1, 0, v_slot + 1)
        # Behind the last tile only the first keys of another one are read: consumers begin it.
        since = gl.where(turn < turns, gl.maximum(steps, 1), 1)
        v_head_row = batch * v_row_b + k_head * v_row_h
        v_row = v_head_row + start
        v_col = k_head * v_col_h
        for it in range(1, since):
            start = gl.load(starts_ptr + first + it)
            _wait_done(done, slot, phase, 0, SLOTS)
            _load(k_desc, k_row + start, k_col, k_room, k_full, slot)
            slot, phase = _next(slot, phase, SLOTS)
            if V_SLOTS == SLOTS:
                _wait_done(done, slot, phase, 0, SLOTS)
            _load(v_desc, v_row, v_col, v_room, v_full, v_slot)
            v_slot = gl.where(v_slot == V_SLOTS - 1, 0, v_slot + 1)
            v_row = v_head_row + start

        head, batch, first = head_1, batch_1, first_1
        steps, q_start, start = steps_1, q_start_1, start_1
        block_1, head_1, batch_1 = _placed(
            tile_2, n_tiles, n_q_blocks, n_outer, first_inner, n_heads, QUEUED
        )
        row_1 = batch_1 * list_stride_b + head_1 * list_stride_h + block_1
        first_1 = gl.load(offsets_ptr + row_1)
        steps_1 = gl.load(full_ptr + row_1)


@gluon.jit
def _shown(scores, length, BLOCK_N: gl.constexpr):
    """Scores with those behind the end of a short key block hidden."""
    if length < BLOCK_N:
        layout: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
        within = gl.arange(0, BLOCK_N, layout)
        inside = gl.expand_dims(within < length, 0)
        scores = gl.where(inside, scores, float("-inf"))
    return scores


@gluon.jit
def _weights(scores, m_i, scale_log2, RAGGED: gl.constexpr, BOUND: gl.constexpr):
    """Weights of a block, and what they are relative to: the bound, or the highest score so far."""
    if not BOUND:
        m_i = gl.maximum(m_i, gl.max(scores, 1) * scale_log2)
        if RAGGED:  # a row that has seen no key yet gets a finite one, so that no NaN arises
            m_i = gl.maximum(m_i, -1e30)
    p = gl.exp2(scores * scale_log2 - gl.expand_dims(m_i, 1))
    return p, m_i


@gluon.jit
def _products(
    q, keys, behind, values, value_ready, v_phase, acc, alpha, more, nothing,
    BOUND: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Scores of a block, and the product of the weights of the block before with its values, which
    still runs.

    Args:
        alpha: what sums are multiplied with before.
        more: whether there are any.
    """
    if EARLY and not BOUND:
        held = hopper.warpgroup_mma_wait(0, [acc])
        acc = hopper.warpgroup_mma_init(held * gl.expand_dims(alpha, 1))
    scores = hopper.warpgroup_mma(q, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)
    if EARLY:  # one follows the other at once
        mbarrier.wait(value_ready, v_phase)
        acc = hopper.warpgroup_mma(behind, values, acc, use_acc=more, is_async=True)
        scores = hopper.warpgroup_mma_wait(1, [scores])
    else:
        scores, held = hopper.warpgroup_mma_wait(0, [scores, acc])
        if not BOUND:
            held = held * gl.expand_dims(alpha, 1)
        mbarrier.wait(value_ready, v_phase)
        acc = hopper.warpgroup_mma(behind, values, held, use_acc=more, is_async=True)
    return scores, acc


@gluon.jit
def _limits(norm_ptr, longest_ptr, pair, rows, n_queries, scale_log2, BOUND: gl.constexpr):
    """What the scores of rows are above to begin with, or never above."""
    if BOUND:
        m_i = gl.load(norm_ptr + pair * n_queries + rows, mask=rows < n_queries, other=0.0)
        return m_i * (gl.load(longest_ptr + pair) * scale_log2)
    return gl.full([ROWS], float("-inf"), gl.float32, rows.type.layout)


@gluon.jit
def _consume(
    rings, pointers, strides, sizes, scale_log2,
    HALF: gl.constexpr, D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr,
    RAGGED: gl.constexpr, HAS_ORDER: gl.constexpr, BOUND: gl.constexpr, QUEUED: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """Attention of one half of the rows of every tile."""
    q_room, q_full, k_room, k_full, v_room, v_full, done = rings
    (
        out_ptr, lse_ptr, norm_ptr, longest_ptr, offsets_ptr, full_ptr, lengths_ptr, q_starts_ptr,
        order_ptr, queue_ptr,
    ) = pointers  # fmt: skip
    (
        out_stride_b, out_stride_h, out_stride_n, list_stride_b, list_stride_h, order_stride_h,
    ) = strides  # fmt: skip
    n_tiles, n_heads, n_q_blocks, n_outer, first_inner, n_queries = sizes
    Q_SLOTS: gl.constexpr = q_room.shape[0] // 2
    SLOTS: gl.constexpr = k_room.shape[0]
    V_SLOTS: gl.constexpr = v_room.shape[0]
    dtype: gl.constexpr = v_room.dtype

    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    of_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    of_p: gl.constexpr = gl.DotOperandLayout(0, of_out, 2)
    # 16 bytes of a row to a thread and 64 to four neighbours, which have them among themselves.
    if BLOCK_D == 128:
        stored: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], [8, 0]],
            [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 128],
        )  # fmt: skip
    else:
        stored: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 4], [0, 32], [8, 0]],
            [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 64],
        )  # fmt: skip
    by_row: gl.constexpr = gl.SliceLayout(1, of_scores)
    by_out_row: gl.constexpr = gl.SliceLayout(1, of_out)
    by_stored_row: gl.constexpr = gl.SliceLayout(1, stored)
    within = gl.arange(0, ROWS, by_row) + HALF * ROWS
    cols = gl.arange(0, BLOCK_D, gl.SliceLayout(0, stored))
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, of_scores)
    none = gl.zeros([ROWS, BLOCK_D], gl.float32, of_out)
    alpha = gl.full([ROWS], 1.0, gl.float32, by_row)

    block, head, batch = _placed(
        _tile(queue_ptr, 0, n_tiles, QUEUED),
        n_tiles, n_q_blocks, n_outer, first_inner, n_heads, QUEUED,
    )  # fmt: skip
    row = batch * list_stride_b + head * list_stride_h + block
    steps = gl.load(full_ptr + row)
    first = gl.load(offsets_ptr + row)
    q_start = gl.load(q_starts_ptr + block)
    q_end = gl.load(q_starts_ptr + block + 1)
    block_1, head_1, batch_1 = _placed(
        _tile(queue_ptr, 1, n_tiles, QUEUED),
        n_tiles, n_q_blocks, n_outer, first_inner, n_heads, QUEUED,
    )  # fmt: skip
    row_1 = batch_1 * list_stride_b + head_1 * list_stride_h + block_1
    steps_1 = gl.load(full_ptr + row_1)
    first_1 = gl.load(offsets_ptr + row_1)
    q_start_1 = gl.load(q_starts_ptr + block_1)
    q_end_1 = gl.load(q_starts_ptr + block_1 + 1)
    tile_2 = _tile(queue_ptr, 2, n_tiles, QUEUED)

    q_slot, q_phase = 0, 0
    k_slot, k_phase = 0, 0
    v_slot, v_phase = 0, 0
    # The first tile is begun here, all others before the one before them is written.
    pair = batch.to(gl.int64) * n_heads + head
    m_i = _limits(norm_ptr, longest_ptr, pair, q_start + within, n_queries, scale_log2, BOUND)
    mbarrier.wait(k_full.index(k_slot), k_phase)
    mbarrier.wait(q_full.index(q_slot * 2 + HALF), q_phase)
    scores = hopper.warpgroup_mma(
        q_room.index(q_slot * 2 + HALF), k_room.index(k_slot).permute((1, 0)), nothing,
        use_acc=False, is_async=True,
    )  # fmt: skip
    scores = hopper.warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(done.index(k_slot))
    k_slot, k_phase = _next(k_slot, k_phase, SLOTS)
    if RAGGED:
        scores = _shown(scores, gl.load(lengths_ptr + first, mask=steps > 0, other=0), BLOCK_N)
    p, m_i = _weights(scores, m_i, scale_log2, RAGGED, BOUND)
    l_i = gl.sum(p, 1)
    behind = gl.convert_layout(p.to(dtype), of_p)

    for turn in range(_turns(n_tiles, QUEUED)):
        # Loads whose results are needed when this tile is written, or by the next ones.
        rows = q_start + within
        row_inside = rows < q_end
        tokens = rows.to(gl.int64)
        if HAS_ORDER:
            tokens = gl.load(order_ptr + head * order_stride_h + rows, mask=row_inside, other=0)
        pair_1 = batch_1.to(gl.int64) * n_heads + head_1
        m_1 = _limits(
            norm_ptr, longest_ptr, pair_1, q_start_1 + within, n_queries, scale_log2, BOUND
        )
        if RAGGED:
            length_1 = gl.load(lengths_ptr + first_1, mask=steps_1 > 0, other=0)
        block_2, head_2, batch_2 = _placed(
            tile_2, n_tiles, n_q_blocks, n_outer, first_inner, n_heads, QUEUED
        )
        row_2 = batch_2 * list_stride_b + head_2 * list_stride_h + block_2
        steps_2 = gl.load(full_ptr + row_2)
        first_2 = gl.load(offsets_ptr + row_2)
        q_start_2 = gl.load(q_starts_ptr + block_2)
        q_end_2 = gl.load(q_starts_ptr + block_2 + 1)
        tile_2 = _tile(queue_ptr, turn + 3, n_tiles, QUEUED)

        q = q_room.index(q_slot * 2 + HALF)
        acc = hopper.warpgroup_mma_init(none)
        for it in range(1, steps):
            if RAGGED:
                length = gl.load(lengths_ptr + first + it)
            mbarrier.wait(k_full.index(k_slot), k_phase)
            scores, acc = _products(
                q, k_room.index(k_slot), behind, v_room.index(v_slot), v_full.index(v_slot),
                v_phase, acc, gl.convert_layout(alpha, by_out_row), it > 1, nothing, BOUND, EARLY,
            )  # fmt: skip
            mbarrier.arrive(done.index(k_slot))
            k_slot, k_phase = _next(k_slot, k_phase, SLOTS)
            v_slot, v_phase = _next(v_slot, v_phase, V_SLOTS)
            if RAGGED:
                scores = _shown(scores, length, BLOCK_N)
            p, m_new = _weights(scores, m_i, scale_log2, RAGGED, BOUND)
            if not BOUND:
                alpha = gl.exp2(m_i - m_new)
                l_i = l_i * alpha
                m_i = m_new
            l_i += gl.sum(p, 1)
            behind = gl.convert_layout(p.to(dtype), of_p)

        # The last product of this tile runs under the first exponentials of the next one.
        q_slot, q_phase = _next(q_slot, q_phase, Q_SLOTS)
        mbarrier.wait(k_full.index(k_slot), k_phase)
        mbarrier.wait(q_full.index(q_slot * 2 + HALF), q_phase)
        scores, acc = _products(
            q_room.index(q_slot * 2 + HALF), k_room.index(k_slot), behind, v_room.index(v_slot),
            v_full.index(v_slot), v_phase, acc, gl.convert_layout(alpha, by_out_row), steps > 1,
            nothing, BOUND, EARLY,
        )  # fmt: skip
        mbarrier.arrive(done.index(k_slot))
        k_slot, k_phase = _next(k_slot, k_phase, SLOTS)
        if RAGGED:
            scores = _shown(scores, length_1, BLOCK_N)
        p, m_1 = _weights(scores, m_1, scale_log2, RAGGED, BOUND)
        l_1 = gl.sum(p, 1)
        behind = gl.convert_layout(p.to(dtype), of_p)

        # Nothing to wait for, but a branch: without it ptxas moves the wait for the product above
        # the exponentials. These values alone are sure to lie there still.
        mbarrier.wait(v_full.index(v_slot), v_phase)
        v_slot, v_phase = _next(v_slot, v_phase, V_SLOTS)
        result = hopper.warpgroup_mma_wait(0, [acc])
        # One without entries has read a block that it has no part in.
        empty = (l_i == 0.0) | (steps == 0)
        l_safe = gl.where(empty, 1.0, l_i)
        share = gl.convert_layout(1.0 / l_safe, by_out_row)
        result = result * gl.expand_dims(share, 1)
        # A weight of 0 hides no NaN.
        hidden = gl.expand_dims(gl.convert_layout(empty, by_out_row), 1)
        result = gl.where(hidden, 0.0, result)
        lse = gl.where(empty, float("-inf"), (m_i + gl.log2(l_safe)) * 0.6931471805599453)
        if BOUND:
            # As in `_hopper.py`: too little is left of the weights, or they are no numbers.
            lse = gl.where((l_i >= 2.6e-26) | (steps == 0), lse, float("inf"))
        pair = batch.to(gl.int64) * n_heads + head
        gl.store(lse_ptr + pair * n_queries + tokens, lse, mask=row_inside)
        laid = gl.convert_layout(result.to(out_ptr.dtype.element_ty), stored)
        to = gl.expand_dims(gl.convert_layout(tokens, by_stored_row), 1)
        inside = gl.expand_dims(gl.convert_layout(row_inside, by_stored_row), 1)
        outs = out_ptr + batch.to(gl.int64) * out_stride_b + head.to(gl.int64) * out_stride_h
        at = gl.expand_dims(cols, 0)
        gl.store(outs + to * out_stride_n + at, laid, mask=inside & (at < D))

        m_i, l_i = m_1, l_1
        head, batch, steps, first, q_start, q_end = (
            head_1,
            batch_1,
            steps_1,
            first_1,
            q_start_1,
            q_end_1,
        )
        head_1, batch_1, steps_1, first_1, q_start_1, q_end_1 = (
            head_2,
            batch_2,
            steps_2,
            first_2,
            q_start_2,
            q_end_2,
        )


@gluon.jit
def _ring(desc, SLOTS: gl.constexpr):
    """Slots for tiles, and for each a barrier that says that it was filled."""
    room = gl.allocate_shared_memory(desc.dtype, [SLOTS] + desc.block_shape, desc.layout)  # noqa: RUF005
    return room, _barriers(SLOTS, 1)


@gluon.jit
def _barriers(SLOTS: gl.constexpr, COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(slot), count=COUNT)
    return barriers


@gluon.jit(do_not_specialize=["n_tiles", "n_outer", "first_inner"])
def _block_sparse_fwd_hopper_gluon(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, norm_ptr, longest_ptr,
    offsets_ptr, full_ptr, starts_ptr, lengths_ptr, q_starts_ptr, order_ptr, queue_ptr,
    q_row_b, q_row_h, q_col_h, k_row_b, k_row_h, k_col_h, v_row_b, v_row_h, v_col_h,
    out_stride_b, out_stride_h, out_stride_n,
    list_stride_b, list_stride_h, order_stride_h,
    n_tiles, n_heads, group, n_q_blocks, n_outer, first_inner, n_queries, scale_log2,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr,
    RAGGED: gl.constexpr, HAS_ORDER: gl.constexpr, BOUND: gl.constexpr, QUEUED: gl.constexpr,
    Q_SLOTS: gl.constexpr, SLOTS: gl.constexpr, V_SLOTS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    q_room, q_full = _ring(q_desc, 2 * Q_SLOTS)
    k_room, k_full = _ring(k_desc, SLOTS)
    v_room, v_full = _ring(v_desc, V_SLOTS)
    done = _barriers(SLOTS, 2)
    hopper.fence_async_shared()
    rings = (q_room, q_full, k_room, k_full, v_room, v_full, done)
    lists = (offsets_ptr, full_ptr, starts_ptr, q_starts_ptr, queue_ptr)
    moves = (
        q_row_b, q_row_h, q_col_h, k_row_b, k_row_h, k_col_h, v_row_b, v_row_h, v_col_h,
        list_stride_b, list_stride_h,
    )  # fmt: skip
    pointers = (
        out_ptr, lse_ptr, norm_ptr, longest_ptr, offsets_ptr, full_ptr, lengths_ptr, q_starts_ptr,
        order_ptr, queue_ptr,
    )  # fmt: skip
    strides = (
        out_stride_b, out_stride_h, out_stride_n, list_stride_b, list_stride_h, order_stride_h,
    )  # fmt: skip
    sizes = (n_tiles, n_heads, n_q_blocks, n_outer, first_inner, n_queries)
    half_0: gl.constexpr = 0
    half_1: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_consume, (rings, pointers, strides, sizes, scale_log2,
                        half_0, D, BLOCK_D, BLOCK_N, RAGGED, HAS_ORDER, BOUND, QUEUED,
                        EARLY)),
            (_consume, (rings, pointers, strides, sizes, scale_log2,
                        half_1, D, BLOCK_D, BLOCK_N, RAGGED, HAS_ORDER, BOUND, QUEUED,
                        EARLY)),
            (_produce, (rings, (q_desc, k_desc, v_desc), lists, moves,
                        (n_tiles, n_heads, group, n_q_blocks, n_outer, first_inner), QUEUED)),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
