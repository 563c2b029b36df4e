"""The lists of a plan from scores, one row of key blocks a program. Launched by `choose.py`."""

import triton
import triton.language as tl


@triton.jit
def _ordered_key(score):
    """uint32 numbers in the order of the fp32 scores."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0 is 0
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _highest(key, possible, count):
    """The `count` highest keys that are possible; of equal ones those of the lowest number."""
    key = tl.where(possible, key, 0)
    threshold = tl.zeros([1], tl.uint32)
    bit = tl.full([1], 1, tl.uint32) << 31
    for _ in range(32):
        candidate = threshold | bit
        enough = tl.sum((possible & (key >= candidate)).to(tl.int32), 0) >= count
        threshold = tl.where(enough, candidate, threshold)
        bit = bit >> 1
    higher = possible & (key > threshold)
    equal = possible & (key == threshold)
    left = count - tl.sum(higher.to(tl.int32), 0)
    return higher | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))


@triton.jit
def _holding(score, key, possible, mass):
    """The highest keys that together hold a share of the softmax, and all equal to the last."""
    top = tl.max(tl.where(possible, score, float("-inf")), 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    score = tl.where(possible, score, top)
    weight = tl.where(possible, tl.math.exp2((score - top) * 1.4426950408889634), 0.0)
    wanted = tl.sum(weight, 0) * mass
    threshold = tl.zeros([1], tl.uint32)
    bit = tl.full([1], 1, tl.uint32) << 31
    for _ in range(32):
        candidate = threshold | bit
        enough = tl.sum(tl.where(key >= candidate, weight, 0.0), 0) >= wanted
        threshold = tl.where(enough, candidate, threshold)
        bit = bit >> 1
    return possible & (key >= threshold)


@triton.jit
def _choose_fwd(
    scores_ptr, context_ptr, hidden_ptr, starts_ptr,
    indices_ptr, first_keys_ptr, n_keys_ptr, offsets_ptr, full_ptr, partial_ptr, pooled_ptr,
    visited_ptr,
    hidden_stride_b, rows_of_batch, n_blocks, room, end_0, end_1, end_2, end_3, mass,
    WIDTH: tl.constexpr, N_LEVELS: tl.constexpr, BY_MASS: tl.constexpr,
    HAS_HIDDEN: tl.constexpr, VISITED: tl.constexpr,
):  # fmt: skip
    """Every level takes the next blocks by score; text is exact, padding is nowhere.

    Thresholds are found by halving over the bits of the scores, which is exact and needs no sort.
    Every row has `room` entries; those behind its last one are block 0. None is partial.
    """
    row = tl.program_id(0)
    block = row % n_blocks
    number = tl.arange(0, WIDTH)
    inside = number < n_blocks
    if HAS_HIDDEN:
        hidden_ptr += row // rows_of_batch * hidden_stride_b
        inside = inside & (tl.load(hidden_ptr + number, mask=inside, other=1) == 0)
    at = row.to(tl.int64) * n_blocks + number
    score = tl.load(scores_ptr + at, mask=number < n_blocks, other=float("-inf"))
    context = tl.load(context_ptr + number, mask=number < n_blocks, other=0)
    exact = inside & (context + tl.load(context_ptr + block) > 0)
    possible = inside & (exact == 0) & (score > float("-inf"))
    key = _ordered_key(score)
    start = tl.load(starts_ptr + number, mask=number < n_blocks, other=0)
    length = tl.load(starts_ptr + number + 1, mask=number < n_blocks, other=0) - start
    first = row.to(tl.int64) * room
    indices_ptr += first
    first_keys_ptr += first
    n_keys_ptr += first

    taken = exact
    written = 0
    for level in tl.static_range(N_LEVELS):
        if level == 0:
            end = end_0
        elif level == 1:
            end = end_1
        elif level == 2:
            end = end_2
        else:
            end = end_3
        upto = _holding(score, key, possible, mass) if BY_MASS else _highest(key, possible, end)
        listed = upto | exact if level == 0 else upto & (taken == 0)
        place = written + tl.cumsum(listed.to(tl.int32), 0) - 1
        listed_inside = listed & (place < room)
        tl.store(indices_ptr + place, number, mask=listed_inside)
        tl.store(first_keys_ptr + place, start, mask=listed_inside)
        tl.store(n_keys_ptr + place, length, mask=listed_inside)
        count = tl.sum(listed.to(tl.int32), 0)
        if level == 0:
            tl.store(full_ptr + row, count)
        else:
            tl.store(pooled_ptr + row * (N_LEVELS - 1) + level - 1, count)
        written += count
        taken = taken | upto
    rest = (number >= written) & (number < room)
    tl.store(indices_ptr + number, 0, mask=rest)
    tl.store(first_keys_ptr + number, 0, mask=rest)
    tl.store(n_keys_ptr + number, tl.load(starts_ptr + 1), mask=rest)
    tl.store(offsets_ptr + row, row * room)
    tl.store(partial_ptr + row, 0)
    if VISITED:
        tl.store(visited_ptr + at, taken.to(tl.uint8), mask=number < n_blocks)
