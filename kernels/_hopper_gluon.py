"""Block-sparse attention forward for Hopper in Gluon: persistent, with every barrier our own.

A program for each multiprocessor takes one query block after the other. One warp fetches queries,
keys and values, through the ends of query blocks too; two warpgroups take 64 queries each. They
wait for nothing but what was fetched, so that one starts or ends a query block, or computes
exponentials, while the other multiplies. Products with the values are one key block behind, and run
under the next block's exponentials.

Masks are a product too, as in `_hopper.py`, of tiles beside those of queries and keys. Words that
mask a partial entry and biases of entries are few numbers, which a warpgroup loads while it
multiplies; full entries pass the words.

Everything in shared memory is written by the tensor memory accelerator and read by the matrix
units alone, so there is nothing to fence between them. Every barrier has a place of its own for as
long as the kernel runs.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from dit_sparse.kernels._gluon_fetch import (
    ROWS,
    _loaded,
    _next,
    _placed,
    _produce,
    _steps,
    _tile,
    _turns,
)
from dit_sparse.kernels._gluon_rows import _limits, _tokens, _write
from dit_sparse.kernels._gluon_weights import _marks, _weighed


@gluon.jit
def _scores(queries, keys, pattern, nothing, COLUMNS: gl.constexpr):
    """The product of queries and keys, which runs; where a mask hides some keys, on top of its
    product: 0 where a key is seen, and far below any score where it is not.

    Both are of one kind and shape, so that the one takes over the sums of the other without a wait.
    """
    q, classes = queries
    k, hidden = keys
    if COLUMNS:
        scores = hopper.warpgroup_mma_init(nothing)
        if pattern >= 0:
            scores = hopper.warpgroup_mma(
                classes, hidden.permute((1, 0)), scores, use_acc=True, is_async=True
            )
        return hopper.warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=True, is_async=True)
    return hopper.warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _products(
    q, keys, pattern, behind, values, value_ready, v_phase, acc, alpha, more, nothing,
    BOUND: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Scores of a block, and behind them the product of the weights of the block before with its
    values. Both still run.

    Args:
        pattern: negative where all keys are seen.
        alpha: what sums are multiplied with before.
        more: whether there are any.
    """
    scores = _scores(q, keys, pattern, nothing, COLUMNS)
    if not BOUND:
        acc = acc * gl.expand_dims(alpha, 1)
    mbarrier.wait(value_ready, v_phase)
    return scores, hopper.warpgroup_mma(behind, values, acc, use_acc=more, is_async=True)


@gluon.jit
def _sums(acc, behind, value_ready, v_phase):
    """The sums of a product of `_products`, when it has ended.

    The weights are in registers that it reads until then: named here, they keep them. Without
    that the next ones are written into the same registers under it.
    """
    # Nothing to wait for, these values lie there still, but a branch: without it ptxas moves the
    # wait for the product above the exponentials.
    mbarrier.wait(value_ready, v_phase)
    acc, _ = hopper.warpgroup_mma_wait(0, [acc, behind])
    return acc


@gluon.jit
def _work(
    tile, lists, strides, sizes,
    COLUMNS: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_WORDS: gl.constexpr,
):  # fmt: skip
    """Head, batch entry, number of entries and the first of them, and queries of a tile; how many
    entries no words mask, and the highest bias."""
    offsets_ptr, full_ptr, partial_ptr, q_starts_ptr, highest_ptr = lists
    _, _, _, list_stride_b, list_stride_h, _ = strides
    _, n_heads, n_q_blocks, _ = sizes
    block, head, batch = _placed(tile, n_q_blocks, n_heads)
    row = batch * list_stride_b + head * list_stride_h + block
    steps = _steps(full_ptr, partial_ptr, row, COLUMNS or HAS_WORDS)
    first = gl.load(offsets_ptr + row)
    q_start = gl.load(q_starts_ptr + block)
    q_end = gl.load(q_starts_ptr + block + 1)
    full = gl.load(full_ptr + row) if HAS_WORDS else 0
    highest = gl.load(highest_ptr + row) if HAS_BIAS else 0.0
    return head, batch, steps, first, q_start, q_end, full, highest


@gluon.jit
def _queries(rings, at):
    """Half a tile of queries and what a mask tells them apart by."""
    q_room, _, _, _, _, _, _, class_room, _ = rings
    return q_room.index(at), class_room.index(at)


@gluon.jit
def _keys(rings, slot):
    """A tile of keys and from which queries a mask hides them."""
    _, _, k_room, _, _, _, _, _, hidden_room = rings
    return k_room.index(slot), hidden_room.index(slot)


@gluon.jit
def _first_scores(rings, pattern, nothing, HALF: gl.constexpr, COLUMNS: gl.constexpr):
    """Of the first block of the first tile."""
    _, q_full, _, k_full, _, _, done, _, _ = rings
    mbarrier.wait(k_full.index(0), 0)
    mbarrier.wait(q_full.index(HALF), 0)
    scores = _scores(_queries(rings, HALF), _keys(rings, 0), pattern, nothing, COLUMNS)
    scores = hopper.warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(done.index(0))
    return scores


@gluon.jit
def _consume(
    rings, pointers, strides, sizes, scale_log2, floor,
    HALF: gl.constexpr, D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr,
    RAGGED: gl.constexpr, HAS_ORDER: gl.constexpr, BOUND: gl.constexpr, DEALT: gl.constexpr,
    COLUMNS: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_WORDS: gl.constexpr,
):  # fmt: skip
    """Attention of one half of the rows of every tile."""
    q_room, q_full, k_room, k_full, v_room, v_full, done, _, _ = rings
    (
        out_ptr, lse_ptr, norm_ptr, longest_ptr, offsets_ptr, full_ptr, partial_ptr, lengths_ptr,
        pattern_ptr, q_starts_ptr, order_ptr, tiles_ptr, turns_ptr, highest_ptr, marked,
    ) = pointers  # fmt: skip
    out_stride_b, out_stride_h, out_stride_n, _, _, order_stride_h = strides
    n_tiles, n_heads, _, n_queries = sizes
    Q_SLOTS: gl.constexpr = q_room.shape[0] // 2
    SLOTS: gl.constexpr = k_room.shape[0]
    V_SLOTS: gl.constexpr = v_room.shape[0]
    dtype: gl.constexpr = v_room.dtype

    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    of_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    of_p: gl.constexpr = gl.DotOperandLayout(0, of_out, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, of_scores)
    by_out_row: gl.constexpr = gl.SliceLayout(1, of_out)
    within = gl.arange(0, ROWS, by_row) + HALF * ROWS
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, of_scores)
    none = gl.zeros([ROWS, BLOCK_D], gl.float32, of_out)
    alpha = gl.full([ROWS], 1.0, gl.float32, by_row)

    lists = (offsets_ptr, full_ptr, partial_ptr, q_starts_ptr, highest_ptr)
    bounds = (norm_ptr, longest_ptr, n_heads, n_queries, scale_log2, floor)
    tile = _tile(tiles_ptr, 0, n_tiles, DEALT)
    head, batch, steps, first, q_start, q_end, full, highest = _work(
        tile, lists, strides, sizes, COLUMNS, HAS_BIAS, HAS_WORDS
    )
    tile = _tile(tiles_ptr, 1, n_tiles, DEALT)
    head_1, batch_1, steps_1, first_1, q_start_1, q_end_1, full_1, highest_1 = _work(
        tile, lists, strides, sizes, COLUMNS, HAS_BIAS, HAS_WORDS
    )
    tile = _tile(tiles_ptr, 2, n_tiles, DEALT)

    q_slot, q_phase, k_slot, k_phase = 0, 0, 1, 0
    v_slot, v_phase = 0, 0
    # The first tile is begun here, all others before the one before them is written.
    m_i = _limits(bounds, batch, head, q_start, within, highest, BOUND, HAS_BIAS)
    pattern = _loaded(pattern_ptr + first, steps > 0, COLUMNS)
    scores = _first_scores(rings, pattern, nothing, HALF, COLUMNS)
    pattern = _loaded(pattern_ptr + first + 1, steps > 1, COLUMNS)
    length = gl.load(lengths_ptr + first, mask=steps > 0, other=0) if RAGGED else 0
    marks = _marks(marked, first, steps > 0, full == 0, HAS_BIAS, HAS_WORDS)
    behind, l_i, m_i = _weighed(
        scores, m_i, length, marks, scale_log2, dtype, of_p, RAGGED, BOUND, HAS_BIAS, HAS_WORDS
    )

    for turn in range(_turns(turns_ptr, n_tiles, DEALT)):
        # Loads whose results are needed when this tile is written, or by the next ones.
        row_inside = q_start + within < q_end
        tokens = _tokens(order_ptr + head * order_stride_h, q_start + within, row_inside, HAS_ORDER)
        m_1 = _limits(bounds, batch_1, head_1, q_start_1, within, highest_1, BOUND, HAS_BIAS)
        pattern_1 = _loaded(pattern_ptr + first_1, steps_1 > 0, COLUMNS)
        length_1 = gl.load(lengths_ptr + first_1, mask=steps_1 > 0, other=0) if RAGGED else 0
        head_2, batch_2, steps_2, first_2, q_start_2, q_end_2, full_2, highest_2 = _work(
            tile, lists, strides, sizes, COLUMNS, HAS_BIAS, HAS_WORDS
        )
        tile = _tile(tiles_ptr, turn + 3, n_tiles, DEALT)

        q = _queries(rings, q_slot * 2 + HALF)
        acc = none
        for it in range(1, steps):
            # Not behind the products, where it costs 11 % at head dim 64 [H200].
            length = gl.load(lengths_ptr + first + it) if RAGGED else 0
            mbarrier.wait(k_full.index(k_slot), k_phase)
            scores, acc = _products(
                q, _keys(rings, k_slot), pattern, behind, v_room.index(v_slot),
                v_full.index(v_slot), v_phase, acc, gl.convert_layout(alpha, by_out_row), it > 1,
                nothing, BOUND, COLUMNS,
            )  # fmt: skip
            pattern = _loaded(pattern_ptr + first + it + 1, it + 1 < steps, COLUMNS)
            marks = _marks(marked, first + it, True, it >= full, HAS_BIAS, HAS_WORDS)
            scores = hopper.warpgroup_mma_wait(1, [scores])
            mbarrier.arrive(done.index(k_slot))
            k_slot, k_phase = _next(k_slot, k_phase, SLOTS)
            weights, mass, m_new = _weighed(
                scores, m_i, length, marks, scale_log2, dtype, of_p,
                RAGGED, BOUND, HAS_BIAS, HAS_WORDS,
            )  # fmt: skip
            if not BOUND:
                alpha = gl.exp2(m_i - m_new)
                l_i = l_i * alpha
                m_i = m_new
            l_i += mass
            acc = _sums(acc, behind, v_full.index(v_slot), v_phase)
            behind = weights
            v_slot, v_phase = _next(v_slot, v_phase, V_SLOTS)

        # The last product of this tile runs under the first exponentials of the next one.
        q_slot, q_phase = _next(q_slot, q_phase, Q_SLOTS)
        mbarrier.wait(k_full.index(k_slot), k_phase)
        mbarrier.wait(q_full.index(q_slot * 2 + HALF), q_phase)
        scores, acc = _products(
            _queries(rings, q_slot * 2 + HALF), _keys(rings, k_slot), pattern_1, behind,
            v_room.index(v_slot), v_full.index(v_slot), v_phase, acc,
            gl.convert_layout(alpha, by_out_row), steps > 1, nothing, BOUND, COLUMNS,
        )  # fmt: skip
        marks = _marks(marked, first_1, steps_1 > 0, full_1 == 0, HAS_BIAS, HAS_WORDS)
        scores = hopper.warpgroup_mma_wait(1, [scores])
        mbarrier.arrive(done.index(k_slot))
        k_slot, k_phase = _next(k_slot, k_phase, SLOTS)
        weights, l_1, m_1 = _weighed(
            scores, m_1, length_1, marks, scale_log2, dtype, of_p,
            RAGGED, BOUND, HAS_BIAS, HAS_WORDS,
        )  # fmt: skip
        result = _sums(acc, behind, v_full.index(v_slot), v_phase)
        behind = weights
        v_slot, v_phase = _next(v_slot, v_phase, V_SLOTS)
        pair = batch.to(gl.int64) * n_heads + head
        _write(
            result, m_i, l_i, steps, tokens, row_inside,
            out_ptr + batch.to(gl.int64) * out_stride_b + head.to(gl.int64) * out_stride_h,
            out_stride_n, lse_ptr + pair * n_queries, D, BLOCK_D, BOUND,
        )  # fmt: skip
        m_i, l_i = m_1, l_1
        pattern = _loaded(pattern_ptr + first_1 + 1, steps_1 > 1, COLUMNS)
        head, batch, steps = head_1, batch_1, steps_1
        first, q_start, q_end, full = first_1, q_start_1, q_end_1, full_1
        head_1, batch_1, steps_1, highest_1 = head_2, batch_2, steps_2, highest_2
        first_1, q_start_1, q_end_1, full_1 = first_2, q_start_2, q_end_2, full_2


@gluon.jit
def _room(desc, SLOTS: gl.constexpr):
    """Slots for tiles."""
    return gl.allocate_shared_memory(desc.dtype, [SLOTS] + desc.block_shape, desc.layout)  # noqa: RUF005


@gluon.jit
def _barriers(SLOTS: gl.constexpr, COUNT: gl.constexpr):
    """A barrier for each slot."""
    barriers = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(slot), count=COUNT)
    return barriers


@gluon.jit(do_not_specialize=["n_tiles"])
def _block_sparse_fwd_hopper_gluon(
    q_desc, k_desc, v_desc, classes_desc, hidden_desc, out_ptr, lse_ptr, norm_ptr, longest_ptr,
    offsets_ptr, full_ptr, partial_ptr, starts_ptr, lengths_ptr, class_ptr, pattern_ptr,
    q_starts_ptr, order_ptr, tiles_ptr, turns_ptr, bias_ptr, highest_ptr, words_ptr,
    q_row_b, q_row_h, q_col_h, k_row_b, k_row_h, k_col_h, v_row_b, v_row_h, v_col_h,
    out_stride_b, out_stride_h, out_stride_n,
    list_stride_b, list_stride_h, order_stride_h, class_stride_h,
    n_tiles, n_heads, group, n_q_blocks, n_queries, scale_log2, floor,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr,
    RAGGED: gl.constexpr, HAS_ORDER: gl.constexpr, BOUND: gl.constexpr, DEALT: gl.constexpr,
    COLUMNS: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_WORDS: gl.constexpr,
    Q_SLOTS: gl.constexpr, SLOTS: gl.constexpr, V_SLOTS: gl.constexpr,
):  # fmt: skip
    q_room, k_room, v_room = (
        _room(q_desc, 2 * Q_SLOTS),
        _room(k_desc, SLOTS),
        _room(v_desc, V_SLOTS),
    )
    if COLUMNS:
        of_mask = classes_desc, hidden_desc
        mask_rooms = _room(classes_desc, 2 * Q_SLOTS), _room(hidden_desc, SLOTS)
    else:  # never read
        of_mask = q_desc, k_desc
        mask_rooms = q_room, k_room
    q_full, k_full, v_full = _barriers(2 * Q_SLOTS, 1), _barriers(SLOTS, 1), _barriers(V_SLOTS, 1)
    done = _barriers(SLOTS, 2)
    hopper.fence_async_shared()
    rings = (
        q_room, q_full, k_room, k_full, v_room, v_full, done, mask_rooms[0], mask_rooms[1],
    )  # fmt: skip
    lists = (
        offsets_ptr, full_ptr, partial_ptr, starts_ptr, q_starts_ptr, class_ptr, pattern_ptr,
        tiles_ptr, turns_ptr,
    )  # fmt: skip
    moves = (
        q_row_b, q_row_h, q_col_h, k_row_b, k_row_h, k_col_h, v_row_b, v_row_h, v_col_h,
        list_stride_b, list_stride_h, class_stride_h,
    )  # fmt: skip
    pointers = (
        out_ptr, lse_ptr, norm_ptr, longest_ptr, offsets_ptr, full_ptr, partial_ptr, lengths_ptr,
        pattern_ptr, q_starts_ptr, order_ptr, tiles_ptr, turns_ptr, highest_ptr,
        (bias_ptr, words_ptr),
    )  # fmt: skip
    strides = (
        out_stride_b, out_stride_h, out_stride_n, list_stride_b, list_stride_h, order_stride_h,
    )  # fmt: skip
    sizes = (n_tiles, n_heads, n_q_blocks, n_queries)
    half_0: gl.constexpr = 0
    half_1: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_consume, (rings, pointers, strides, sizes, scale_log2, floor,
                        half_0, D, BLOCK_D, BLOCK_N, RAGGED, HAS_ORDER, BOUND, DEALT, COLUMNS,
                        HAS_BIAS, HAS_WORDS)),
            (_consume, (rings, pointers, strides, sizes, scale_log2, floor,
                        half_1, D, BLOCK_D, BLOCK_N, RAGGED, HAS_ORDER, BOUND, DEALT, COLUMNS,
                        HAS_BIAS, HAS_WORDS)),
            (_produce, (rings, (q_desc, k_desc, v_desc, of_mask[0], of_mask[1]), lists, moves,
                        (n_tiles, n_heads, group, n_q_blocks), DEALT, COLUMNS, HAS_WORDS)),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
