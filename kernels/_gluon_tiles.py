"""Of the Hopper kernel in Gluon for pooled entries: what a step reads, and what fetches it."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from dit_sparse.kernels._gluon_fetch import ROWS, _load, _next, _placed, _tile, _turns, _wait_done

#: Keys of a step.
BLOCK_N = gl.constexpr(128)


@gluon.jit
def _steps_of(whole, count, TILES: gl.constexpr):
    """How many steps of so many tiles read whole ones, and how many there are.

    The first one does in any case, of none if need be: it is computed at the end of the query block
    before, where short tiles would spill registers.
    """
    first = gl.maximum((whole + TILES - 1) // TILES, 1)
    return first, first + (count - whole + TILES - 1) // TILES


@gluon.jit
def _entries(listed_ptr, step, whole, count, TILES: gl.constexpr):
    """Entries of a step, see `_pooled_tiles_fwd`; behind the last whole one or the last one that
    again, without tokens. Of a row without any 0."""
    first = _steps_of(whole, count, TILES)[0]
    behind = step >= first
    listed_ptr += gl.where(behind, whole, 0)
    at = TILES * gl.where(behind, step - first, step)
    last = gl.where(behind, count - whole, whole) - 1
    held, some = gl.maximum(last, 0), count > 0
    found = ()
    for n in gl.static_range(TILES):
        entry = gl.load(listed_ptr + gl.minimum(at + n, held), mask=some, other=0)
        found = found + (entry & gl.where(at + n <= last, -1, -256),)  # noqa: RUF005
    return found


@gluon.jit
def _pooled_work(tile, lists, strides, sizes, EACH: gl.constexpr):
    """Head, batch entry, entries, how many are whole and how many there are, and queries of a
    tile."""
    offsets_ptr, wholes_ptr, counts_ptr, q_starts_ptr, entries_ptr = lists
    list_stride_b, list_stride_h = strides
    n_heads, n_q_blocks = sizes
    block, head, batch = _placed(tile, n_q_blocks, n_heads)
    row = batch * list_stride_b + head * list_stride_h + block
    listed_ptr = entries_ptr + gl.load(offsets_ptr + row).to(gl.int64) * EACH
    whole, count = gl.load(wholes_ptr + row), gl.load(counts_ptr + row)
    q_start, q_end = gl.load(q_starts_ptr + block), gl.load(q_starts_ptr + block + 1)
    return head, batch, listed_ptr, whole, count, q_start, q_end


@gluon.jit
def _fetch(desc, head_row, entries, room, full, slot, pred=True):
    """Loads the tiles of a step into a slot of a ring, which must be free."""
    KEYS: gl.constexpr = desc.block_shape[0]
    TILES: gl.constexpr = BLOCK_N // KEYS
    ready, into = full.index(slot), room.index(slot)
    mbarrier.expect(ready, TILES * desc.block_type.nbytes, pred=pred)
    for n in gl.static_range(TILES):
        row = head_row + (entries[n] >> 11) * KEYS
        part = into.slice(n * KEYS, KEYS)
        tma.async_copy_global_to_shared(desc, [row, 0], ready, part, pred=pred)


@gluon.jit
def _produce_pooled(rings, descs, lists, strides, sizes, EACH: gl.constexpr):
    """As `_produce`, of tiles of pooled rows."""
    q_room, q_full, k_room, k_full, v_room, v_full, done = rings
    q_desc, k_desc, v_desc = descs
    any_ptr, _, _, _, _ = lists
    q_row_b, q_row_h, q_col_h, list_stride_b, list_stride_h = strides
    n_tiles, n_heads, n_q_blocks, rows_of_head = sizes
    Q_SLOTS: gl.constexpr = q_room.shape[0] // 2
    SLOTS: gl.constexpr = k_room.shape[0]
    V_SLOTS: gl.constexpr = v_room.shape[0]
    TILES: gl.constexpr = BLOCK_N // k_desc.block_shape[0]
    by_row, of_heads = (list_stride_b, list_stride_h), (n_heads, n_q_blocks)

    tile = _tile(any_ptr, 0, n_tiles, False)
    head, batch, listed, whole, count, q_start, _ = _pooled_work(
        tile, lists, by_row, of_heads, EACH
    )
    q_slot, slot, phase, v_slot = 0, 0, 0, 0
    before, v_row = _entries(listed, 0, whole, count, TILES), 0  # of the step whose values are next
    since = 0  # steps of the tile before
    turns = _turns(any_ptr, n_tiles, False)
    for turn in range(turns + 1):
        # Loaded a whole tile before it is needed.
        tile = _tile(any_ptr, turn + 1, n_tiles, False)
        head_1, batch_1, listed_1, whole_1, count_1, q_start_1, _ = _pooled_work(
            tile, lists, by_row, of_heads, EACH
        )
        entries = _entries(listed, 0, whole, count, TILES)
        k_row = (batch * n_heads + head) * rows_of_head
        _wait_done(done, slot, phase, 0, SLOTS)
        _fetch(k_desc, k_row, entries, k_room, k_full, slot)
        slot, phase = _next(slot, phase, SLOTS)
        crowded = since < SLOTS - 1 if Q_SLOTS == 2 else True
        _wait_done(done, slot, phase, SLOTS - 2, SLOTS, pred=crowded)
        q_row = batch * q_row_b + head * q_row_h + q_start
        for half in gl.static_range(2):
            _load(q_desc, q_row + half * ROWS, head * q_col_h, q_room, q_full, q_slot * 2 + half)
        if Q_SLOTS == 2:
            q_slot ^= 1
        if V_SLOTS == SLOTS:
            _wait_done(done, slot, phase, 0, SLOTS)
        _fetch(v_desc, v_row, before, v_room, v_full, v_slot, pred=turn > 0)
        if turn > 0:
            v_slot = gl.where(v_slot == V_SLOTS - 1, 0, v_slot + 1)
        # Behind the last tile only the first keys of another one are read: consumers begin it.
        steps = _steps_of(whole, count, TILES)[1]
        since = gl.where(turn < turns, steps, 1)
        before, v_row = entries, k_row
        for it in range(1, since):
            entries = _entries(listed, it, whole, count, TILES)
            _wait_done(done, slot, phase, 0, SLOTS)
            _fetch(k_desc, k_row, entries, k_room, k_full, slot)
            slot, phase = _next(slot, phase, SLOTS)
            if V_SLOTS == SLOTS:
                _wait_done(done, slot, phase, 0, SLOTS)
            _fetch(v_desc, k_row, before, v_room, v_full, v_slot)
            v_slot = gl.where(v_slot == V_SLOTS - 1, 0, v_slot + 1)
            before = entries
        head, batch, listed, whole, count = head_1, batch_1, listed_1, whole_1, count_1
        q_start = q_start_1
