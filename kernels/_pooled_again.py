"""Pooled entries of rows whose bound is too far above their scores. Launched by `pooled.py`."""

import triton
import triton.language as tl

from dit_sparse.kernels._approximate import _load_rows, _soften
from dit_sparse.kernels._hopper_pooled import _bias, _share


@triton.jit
def _pooled_again_fwd(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, again_ptr,
    offsets_ptr, counts_ptr, entries_ptr, q_starts_ptr, order_ptr,
    q_stride_b, q_stride_h, q_stride_n, k_rows_of_head,
    out_stride_b, out_stride_h, out_stride_n,
    list_stride_b, list_stride_h, order_stride_h,
    n_heads, n_q_blocks, n_queries, per_entry, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr,
    LOG_SIZE: tl.constexpr, LOG_ROWS: tl.constexpr,
    RAGGED: tl.constexpr, HAS_ORDER: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Goes on from `out` and `lse` with a running maximum in the rows that `again` marks, of EACH
    query blocks: as a rule there are none, and a look at many at once takes least time."""
    groups = tl.cdiv(n_q_blocks, EACH)
    first = tl.program_id(0) % groups * EACH
    behind = tl.minimum(first + EACH, n_q_blocks)
    head = (tl.program_id(0) // groups) % n_heads
    batch = tl.program_id(0) // groups // n_heads
    pair = (batch * n_heads + head).to(tl.int64)
    again_ptr += pair * n_queries
    together = tl.load(q_starts_ptr + first) + tl.arange(0, EACH * BLOCK_M)
    within = together < tl.load(q_starts_ptr + behind)
    if tl.max(tl.load(again_ptr + together, mask=within, other=0).to(tl.int32), 0) == 0:
        return

    q_ptr += batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    out_ptr += batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    lse_ptr += pair * n_queries
    k_ptr += pair * k_rows_of_head * D
    v_ptr += pair * k_rows_of_head * D
    cols = tl.arange(0, BLOCK_D)
    for block in range(first, behind):
        row = batch * list_stride_b + head * list_stride_h + block
        count = tl.load(counts_ptr + row)
        rows = tl.load(q_starts_ptr + block) + tl.arange(0, BLOCK_M)
        inside = rows < tl.load(q_starts_ptr + block + 1)
        marked = tl.load(again_ptr + rows, mask=inside, other=0) != 0
        if tl.max(marked.to(tl.int32), 0) != 0:
            tokens = rows.to(tl.int64)
            if HAS_ORDER:
                tokens = tl.load(order_ptr + head * order_stride_h + rows, mask=marked, other=0)
            both = marked[:, None] & (cols < D)[None, :]
            q_ptrs = q_ptr + rows.to(tl.int64)[:, None] * q_stride_n + cols[None, :]
            q = tl.load(q_ptrs, mask=both, other=0.0)
            out_ptrs = out_ptr + tokens[:, None] * out_stride_n + cols[None, :]
            lse_ptrs = lse_ptr + tokens
            m_i = tl.load(lse_ptrs, mask=marked, other=float("-inf")) * 1.4426950408889634
            l_i = tl.where(m_i == float("-inf"), 0.0, 1.0)
            acc = tl.load(out_ptrs, mask=both, other=0.0).to(tl.float32)

            listed_ptr = entries_ptr + tl.load(offsets_ptr + row).to(tl.int64) * per_entry
            for nth in range(count):
                entry = tl.load(listed_ptr + nth)
                pooled = (entry >> 11) * ROWS + tl.arange(0, ROWS)
                k = _load_rows(k_ptr, pooled, pooled >= 0, D, BLOCK_D)
                v = _load_rows(v_ptr, pooled, pooled >= 0, D, BLOCK_D)
                bias = _bias(entry, LOG_SIZE, LOG_ROWS)
                scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 + bias
                if RAGGED:
                    share = _share(entry, bias, ROWS)
                    logarithm = tl.math.log2(tl.maximum(share, 1e-9))
                    scores += tl.where(share > 0.0, logarithm, float("-inf"))[None, :]
                m_i, l_i, acc, _, _ = _soften(m_i, l_i, acc, scores, v)

            empty = l_i == 0.0
            l_safe = tl.where(empty, 1.0, l_i)
            acc = tl.where(empty[:, None], 0.0, acc / l_safe[:, None])
            lse = tl.where(empty, float("-inf"), (m_i + tl.math.log2(l_safe)) * 0.6931471805599453)
            tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=both)
            tl.store(lse_ptrs, lse, mask=marked)
