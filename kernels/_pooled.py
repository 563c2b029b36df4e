"""Tiles of pooled rows that every query block reads. Launched by `pooled.py`."""

import triton
import triton.language as tl


@triton.jit
def _pooled_tiles_fwd(
    indices_ptr, offsets_ptr, full_ptr, partial_ptr, pools_ptr, starts_ptr, tiles_ptr,
    wholes_ptr, counts_ptr, n_k_blocks,
    SIZE: tl.constexpr, FACTORS: tl.constexpr, N_FACTORS: tl.constexpr, ROWS: tl.constexpr,
    PER_ENTRY: tl.constexpr, RAGGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tiles of ROWS pooled rows, PER_ENTRY at most for an entry, and how many in all. Whole ones
    are first, which have as many tokens as there is room for; of others how many there are.

    A tile is its number, 3 bits for the exponent of the factor, and 8 bits for how many tokens its
    block has from its first row on. FACTORS has bit s set for factor 2**s. The tiles of a
    factor begin behind those of the smaller ones, and those of a block are neighbours.
    """
    row = tl.program_id(0)
    first = tl.load(offsets_ptr + row).to(tl.int64)
    tiles_ptr += first * PER_ENTRY
    indices_ptr += first + tl.load(full_ptr + row) + tl.load(partial_ptr + row)
    pools_ptr += row.to(tl.int64) * N_FACTORS
    nth = tl.arange(0, BLOCK)
    written = 0
    for short in tl.static_range(2 if RAGGED else 1):
        listed_ptr = indices_ptr
        base = 0
        nth_factor = 0
        for s in tl.static_range(1, 8):
            if (FACTORS >> s) & 1:
                of_block = (SIZE >> s) // ROWS if SIZE >> s > ROWS else 1
                room = SIZE // of_block
                entries = tl.load(pools_ptr + nth_factor)
                for at in range(0, entries * of_block, BLOCK):
                    number = at + nth
                    kept = number < entries * of_block
                    block = tl.load(listed_ptr + number // of_block, mask=kept, other=0)
                    part = number % of_block
                    left = tl.full([BLOCK], room, tl.int32)
                    if RAGGED:
                        start = tl.load(starts_ptr + block, mask=kept, other=0)
                        left = tl.load(starts_ptr + block + 1, mask=kept, other=0) - start
                        left = tl.minimum(left - part * room, room)
                        kept &= (left > 0) & (left < room) if short else left == room
                    tile = ((base + block * of_block + part) << 11) | (s << 8) | left
                    place = tl.cumsum(kept.to(tl.int32), 0)
                    tl.store(tiles_ptr + written + place - 1, tile, mask=kept)
                    written += tl.sum(kept.to(tl.int32), 0)
                listed_ptr += entries
                base += n_k_blocks * of_block
                nth_factor += 1
        if not short:
            tl.store(wholes_ptr + row, written)
    tl.store(counts_ptr + row, written)
