"""Of the Hopper kernel in Gluon: which tiles a program takes, and what fetches them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

#: Query rows of one warpgroup.
ROWS = gl.constexpr(64)


@gluon.jit
def _tile(tiles_ptr, turn, n_tiles, DEALT: gl.constexpr):
    """Which tile a program takes in a turn; any of them behind its last one."""
    at = turn * gl.num_programs(0) + gl.program_id(0)
    if DEALT:
        return gl.load(tiles_ptr + at)
    return gl.minimum(at, n_tiles - 1)


@gluon.jit
def _turns(turns_ptr, n_tiles, DEALT: gl.constexpr):
    """How many tiles a program takes."""
    if DEALT:
        return gl.load(turns_ptr + gl.program_id(0))
    programs = gl.num_programs(0)
    return (n_tiles - gl.program_id(0) + programs - 1) // programs


@gluon.jit
def _placed(tile, n_q_blocks, n_heads):
    """Query block, head and batch entry of a tile."""
    pair = tile // n_q_blocks
    return tile - pair * n_q_blocks, pair % n_heads, pair // n_heads


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
def _load_both(descs, row, col, rooms, full, slot, mask_row, COLUMNS: gl.constexpr):
    """`_load`, and a tile of the mask on the same barrier, unless its row is negative."""
    desc, mask_desc = descs
    room, mask_room = rooms
    if COLUMNS:
        ready = full.index(slot)
        both: gl.constexpr = desc.block_type.nbytes + mask_desc.block_type.nbytes
        mbarrier.expect(ready, both, pred=mask_row >= 0)
        mbarrier.expect(ready, desc.block_type.nbytes, pred=mask_row < 0)
        tma.async_copy_global_to_shared(
            mask_desc, [mask_row, 0], ready, mask_room.index(slot), pred=mask_row >= 0
        )
        tma.async_copy_global_to_shared(desc, [row, col], ready, room.index(slot))
    else:
        _load(desc, row, col, room, full, slot)


@gluon.jit
def _steps(full_ptr, partial_ptr, row, MASKED: gl.constexpr):
    """How many entries of a row are read: with a mask or words those too that they are for."""
    steps = gl.load(full_ptr + row)
    if MASKED:
        steps += gl.load(partial_ptr + row)
    return steps


@gluon.jit
def _loaded(pointer, mask, COLUMNS: gl.constexpr):
    """A number that only masks need; negative where there is none."""
    if COLUMNS:
        return gl.load(pointer, mask=mask, other=-1)
    return 0


@gluon.jit
def _produce(
    rings, descs, lists, strides, sizes,
    DEALT: gl.constexpr, COLUMNS: gl.constexpr, HAS_WORDS: gl.constexpr,
):  # fmt: skip
    """Fetches everything, in the order in which it is read: keys, and the values of the block
    before, in an earlier tile too.

    One barrier for each slot of keys says that they were multiplied with the queries. By then the
    values of two key blocks before were multiplied too, and the tile before with its queries.
    """
    q_room, q_full, k_room, k_full, v_room, v_full, done, class_room, hidden_room = rings
    q_desc, k_desc, v_desc, classes_desc, hidden_desc = descs
    (
        offsets_ptr, full_ptr, partial_ptr, starts_ptr, q_starts_ptr, class_ptr, pattern_ptr,
        tiles_ptr, turns_ptr,
    ) = lists  # fmt: skip
    (
        q_row_b, q_row_h, q_col_h, k_row_b, k_row_h, k_col_h, v_row_b, v_row_h, v_col_h,
        list_stride_b, list_stride_h, class_stride_h,
    ) = strides  # fmt: skip
    n_tiles, n_heads, group, n_q_blocks = sizes
    Q_SLOTS: gl.constexpr = q_room.shape[0] // 2
    SLOTS: gl.constexpr = k_room.shape[0]
    V_SLOTS: gl.constexpr = v_room.shape[0]
    KEYS: gl.constexpr = k_desc.block_shape[0]
    of_queries, query_rooms = (q_desc, classes_desc), (q_room, class_room)
    of_keys, key_rooms = (k_desc, hidden_desc), (k_room, hidden_room)

    tile = _tile(tiles_ptr, 0, n_tiles, DEALT)
    block, head, batch = _placed(tile, n_q_blocks, n_heads)
    row = batch * list_stride_b + head * list_stride_h + block
    first = gl.load(offsets_ptr + row)
    steps = _steps(full_ptr, partial_ptr, row, COLUMNS or HAS_WORDS)
    q_start = gl.load(q_starts_ptr + block)
    kind = _loaded(class_ptr + head * class_stride_h + block, True, COLUMNS)
    start = gl.load(starts_ptr + first, mask=steps > 0, other=0)
    pattern = _loaded(pattern_ptr + first, steps > 0, COLUMNS)
    tile_1 = _tile(tiles_ptr, 1, n_tiles, DEALT)
    block_1, head_1, batch_1 = _placed(tile_1, n_q_blocks, n_heads)
    row_1 = batch_1 * list_stride_b + head_1 * list_stride_h + block_1
    first_1 = gl.load(offsets_ptr + row_1)
    steps_1 = _steps(full_ptr, partial_ptr, row_1, COLUMNS or HAS_WORDS)
    q_slot = 0
    slot, phase = 0, 0  # of the next keys
    v_slot = 0
    v_row, v_col = 0, 0  # of the block before
    since = 0  # key blocks of the tile before
    turns = _turns(turns_ptr, n_tiles, DEALT)
    for turn in range(turns + 1):
        # What the next two tiles take from memory, each load a whole tile before it is needed.
        q_start_1 = gl.load(q_starts_ptr + block_1)
        kind_1 = _loaded(class_ptr + head_1 * class_stride_h + block_1, True, COLUMNS)
        start_1 = gl.load(starts_ptr + first_1, mask=steps_1 > 0, other=0)
        pattern_1 = _loaded(pattern_ptr + first_1, steps_1 > 0, COLUMNS)
        tile_2 = _tile(tiles_ptr, turn + 2, n_tiles, DEALT)

        k_head = head // group  # as many heads of q share one of k and v
        k_row = batch * k_row_b + k_head * k_row_h
        k_col = k_head * k_col_h
        _wait_done(done, slot, phase, 0, SLOTS)
        _load_both(of_keys, k_row + start, k_col, key_rooms, k_full, slot, pattern * KEYS, COLUMNS)
        slot, phase = _next(slot, phase, SLOTS)
        # Where there is room for the queries of two tiles, so many key blocks say that it is free.
        crowded = since < SLOTS - 1 if Q_SLOTS == 2 else True
        _wait_done(done, slot, phase, SLOTS - 2, SLOTS, pred=crowded)
        q_row = batch * q_row_b + head * q_row_h + q_start
        for half in gl.static_range(2):
            _load_both(
                of_queries, q_row + half * ROWS, head * q_col_h, query_rooms, q_full,
                q_slot * 2 + half, (kind * 2 + half) * ROWS, COLUMNS,
            )  # fmt: skip
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
            pattern = _loaded(pattern_ptr + first + it, True, COLUMNS)
            _wait_done(done, slot, phase, 0, SLOTS)
            _load_both(
                of_keys, k_row + start, k_col, key_rooms, k_full, slot, pattern * KEYS, COLUMNS
            )
            slot, phase = _next(slot, phase, SLOTS)
            if V_SLOTS == SLOTS:
                _wait_done(done, slot, phase, 0, SLOTS)
            _load(v_desc, v_row, v_col, v_room, v_full, v_slot)
            v_slot = gl.where(v_slot == V_SLOTS - 1, 0, v_slot + 1)
            v_row = v_head_row + start

        head, batch, first = head_1, batch_1, first_1
        steps, q_start, start = steps_1, q_start_1, start_1
        kind, pattern = kind_1, pattern_1
        block_1, head_1, batch_1 = _placed(tile_2, n_q_blocks, n_heads)
        row_1 = batch_1 * list_stride_b + head_1 * list_stride_h + block_1
        first_1 = gl.load(offsets_ptr + row_1)
        steps_1 = _steps(full_ptr, partial_ptr, row_1, COLUMNS or HAS_WORDS)
