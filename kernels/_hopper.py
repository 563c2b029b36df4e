"""Block-sparse attention forward for Hopper: warp-specialised. Launched by `block_sparse.py`.

The shape of the loop is what lets Triton split it into a producer and two consumer warpgroups and
keep both matrix products asynchronous (seen in SASS for Triton 3.6 and 3.9): one loop, no branch in
it, no early return before it, only scalar loads and loads through descriptors in it, queries
through a descriptor made in the kernel, and the product with the values one block behind, so that
it runs under the next block's softmax.

Masks are a product too, of e5m2 rows that were made with the plan (`dit_sparse.mask_product`):
comparisons would take as long as the softmax. It comes first: to a sum that has begun the matrix
unit adds products of 8 bits with less precision.
"""

import triton
import triton.language as tl

#: Triton 3.6 puts barriers that nothing waits for at the beginning of shared memory, where keys
#: come to lie, one of 8 bytes for each stage, and never invalidates them; 3.9 does.
_STALE_BARRIERS = tl.constexpr(
    tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)
    and not triton.knobs.runtime.interpret
)


@triton.jit
def _forget_stale_barriers(STAGES: tl.constexpr = 2):
    """0, when barriers are invalidated whose place in shared memory is used again; for what only
    the producer computes before its first load. Without that PTX leaves undefined what happens
    there: multiprocessors keep barriers in a cache of their own.

    STAGES: of the launch, 2 or 4.
    """
    zero = 0
    if _STALE_BARRIERS:
        zero = tl.inline_asm_elementwise(
            """{
            .reg .b32 stale;
            mov.b32 stale, global_smem;
            mbarrier.inval.shared::cta.b64 [stale];
            mbarrier.inval.shared::cta.b64 [stale+8];
            fence.proxy.async.shared::cta;
            mov.b32 $0, 0;
            }""", "=r", [], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        if STAGES > 2:
            zero += tl.inline_asm_elementwise(
                """{
                .reg .b32 stale;
                mov.b32 stale, global_smem;
                mbarrier.inval.shared::cta.b64 [stale+16];
                mbarrier.inval.shared::cta.b64 [stale+24];
                fence.proxy.async.shared::cta;
                mov.b32 $0, 0;
                }""", "=r", [], dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
    return zero


@triton.jit
def _place(n_q_blocks, n_outer, first_inner, n_heads):
    """Query block, head and batch entry of a program.

    The blocks around the picture read everything: were they not begun first, in all heads, the last
    of them would run on alone. Query blocks of one head are neighbours in the launch order and walk
    the same keys in L2.
    """
    tile = tl.program_id(0)
    outer = tl.num_programs(0) // n_q_blocks * n_outer
    n_inner = n_q_blocks - n_outer
    width = tl.where(tile < outer, n_outer, n_inner)
    number = tl.where(tile < outer, tile, tile - outer)
    block = number % width
    skipped = tl.where(block < first_inner, 0, n_inner)
    block += tl.where(tile < outer, skipped, first_inner)
    pair = number // width
    return block, pair % n_heads, pair // n_heads


@triton.jit
def _queued(queue_ptr, at, n_q_blocks, n_heads):
    """Query block, head and batch entry of the tile at a place of a queue."""
    tile = tl.load(queue_ptr + at)
    pair = tile // n_q_blocks
    return tile % n_q_blocks, pair % n_heads, pair // n_heads


@triton.jit(do_not_specialize=["n_outer", "first_inner"])  # compiled once for all of them
def _block_sparse_fwd_hopper(
    q_ptr, k_desc, v_desc, classes_ptr, hidden_desc, out_ptr, lse_ptr,
    norm_ptr, longest_ptr,
    offsets_ptr, full_ptr, partial_ptr, starts_ptr, lengths_ptr, class_ptr, pattern_ptr,
    q_starts_ptr, order_ptr, queue_ptr,
    q_rows, q_cols, q_row_stride, q_row_b, q_row_h, q_col_h,
    k_row_b, k_row_h, k_col_h,
    v_row_b, v_row_h, v_col_h,
    out_stride_b, out_stride_h, out_stride_n,
    list_stride_b, list_stride_h, order_stride_h, class_stride_h,
    n_heads, group, n_q_blocks, n_outer, first_inner, n_queries, n_classes, scale_log2, floor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RAGGED: tl.constexpr, HAS_ORDER: tl.constexpr, COLUMNS: tl.constexpr, BOUND: tl.constexpr,
    QUEUED: tl.constexpr,
):  # fmt: skip
    if QUEUED:
        block, head, batch = _queued(queue_ptr, tl.program_id(0), n_q_blocks, n_heads)
    else:
        block, head, batch = _place(n_q_blocks, n_outer, first_inner, n_heads)
    q_start = tl.load(q_starts_ptr + block)
    q_desc = tl.make_tensor_descriptor(
        q_ptr, shape=[q_rows, q_cols], strides=[q_row_stride, 1], block_shape=[BLOCK_M, BLOCK_D]
    )
    if COLUMNS:
        # Made before anything is loaded: queries were garbage when it was made behind their load.
        classes_desc = tl.make_tensor_descriptor(
            classes_ptr, shape=[n_classes, COLUMNS], strides=[COLUMNS, 1],
            block_shape=[BLOCK_M, COLUMNS],
        )  # fmt: skip
        number = tl.load(class_ptr + head * class_stride_h + block)
    q_row = batch * q_row_b + head * q_row_h + q_start + _forget_stale_barriers()
    q = q_desc.load([q_row, head * q_col_h])
    if COLUMNS:
        classes = classes_desc.load([number * BLOCK_M, 0])

    row = batch * list_stride_b + head * list_stride_h + block
    first = tl.load(offsets_ptr + row)
    steps = tl.load(full_ptr + row)
    if COLUMNS:  # masked or not, all entries stand in one list
        steps += tl.load(partial_ptr + row)
    starts_ptr += first
    lengths_ptr += first
    pattern_ptr += first
    k_head = head // group  # as many heads of q share one of k and v
    k_row = batch * k_row_b + k_head * k_row_h
    v_row = batch * v_row_b + k_head * v_row_h
    k_col = k_head * k_col_h
    v_col = k_head * v_col_h
    within = tl.arange(0, BLOCK_N)

    # No lower than the floor under real scores, so that what is hidden weighs 0 from the first.
    m_i = tl.full([BLOCK_M], floor, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    alpha = tl.full([BLOCK_M], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    rows = q_start + tl.arange(0, BLOCK_M)
    if BOUND:  # scores cannot rise above it, so no running maximum is needed
        norm_ptr += (batch.to(tl.int64) * n_heads + head) * n_queries
        m_i = tl.load(norm_ptr + rows, mask=rows < n_queries, other=0.0)
        m_i *= tl.load(longest_ptr + batch * n_heads + head) * scale_log2
    # The weights of the block before, as bits: a loop-carried bfloat16 tile would be sent through
    # shared memory, and the product with it waited for.
    behind = tl.zeros([BLOCK_M, BLOCK_N], tl.int16)

    for it in tl.range(0, steps, warp_specialize=True):
        k = k_desc.load([k_row + tl.load(starts_ptr + it), k_col])
        # What the softmax needs from memory is loaded before the product with v: a load behind it
        # waits for it, and so does all that depends on the load.
        if RAGGED:
            length = tl.load(lengths_ptr + it)
        if COLUMNS:
            hidden = hidden_desc.load([tl.load(pattern_ptr + it) * BLOCK_N, 0])
            scores = tl.dot(q, tl.trans(k), tl.dot(classes, tl.trans(hidden)))
        else:
            scores = tl.dot(q, tl.trans(k))
        behind_start = tl.load(starts_ptr + tl.maximum(it - 1, 0))
        v = v_desc.load([v_row + behind_start, v_col])
        if not BOUND:
            acc = acc * alpha[:, None]
        acc = tl.dot(behind.to(v.dtype, bitcast=True), v, acc)
        if BOUND:
            shift = -m_i[:, None]
            if RAGGED:
                shift += tl.where(within < length, 0.0, float("-inf"))[None, :]
            p = tl.math.exp2(scores * scale_log2 + shift)
            l_i += tl.sum(p, 1)
        elif RAGGED:  # a column bias rides on the scaling, a select would not
            bias = tl.where(within < length, 0.0, float("-inf"))
            scores = scores * scale_log2 + bias[None, :]
            # A row that has seen no key yet gets a finite maximum, so that no NaN arises.
            m_new = tl.maximum(tl.maximum(m_i, tl.max(scores, 1)), -1e30)
            p = tl.math.exp2(scores - m_new[:, None])
        else:
            m_new = tl.maximum(m_i, tl.max(scores, 1) * scale_log2)
            p = tl.math.exp2(scores * scale_log2 - m_new[:, None])
        if not BOUND:
            alpha = tl.math.exp2(m_i - m_new)
            l_i = l_i * alpha + tl.sum(p, 1)
            m_i = m_new
        behind = p.to(v.dtype).to(tl.int16, bitcast=True)

    last = tl.maximum(steps - 1, 0)
    v_start = tl.load(starts_ptr + last, mask=steps > 0, other=0)
    v = v_desc.load([v_row + v_start, v_col])
    if not BOUND:
        acc = acc * alpha[:, None]
    acc = tl.dot(behind.to(v.dtype, bitcast=True), v, acc)
    acc = tl.where((l_i == 0.0)[:, None], 0.0, acc)  # a weight of 0 hides no NaN

    rows = q_start + tl.arange(0, BLOCK_M)
    row_inside = rows < tl.load(q_starts_ptr + block + 1)
    tokens = rows.to(tl.int64)
    if HAS_ORDER:
        tokens = tl.load(order_ptr + head * order_stride_h + rows, mask=row_inside, other=0)
    cols = tl.arange(0, BLOCK_D)
    out_ptr += batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    out_ptrs = out_ptr + tokens[:, None] * out_stride_n + cols[None, :]
    out_inside = row_inside[:, None] & (cols[None, :] < D)
    lse_ptrs = lse_ptr + (batch.to(tl.int64) * n_heads + head) * n_queries + tokens
    empty = l_i == 0.0
    l_safe = tl.where(empty, 1.0, l_i)
    acc = acc / l_safe[:, None]
    lse = tl.where(empty, float("-inf"), (m_i + tl.math.log2(l_safe)) * 0.6931471805599453)
    if BOUND:
        # What is left of the weights may be too little to trust: 2^-126 is the least normal number,
        # and above it 17 bits of keys and 24 of precision. No number is no more to be trusted.
        lse = tl.where(~(l_i >= 2.6e-26) & (steps > 0), float("inf"), lse)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=out_inside)
    tl.store(lse_ptrs, lse, mask=row_inside)
