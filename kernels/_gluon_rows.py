"""Of the Hopper kernel in Gluon: what the rows of a query block begin with, and their results."""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl

from dit_sparse.kernels._gluon_fetch import ROWS


@constexpr_function
def _stored(width):
    """How results are written: 16 bytes of a row to a thread and 64 to four neighbours, which have
    them among themselves after a product."""
    wide = [[0, 32], [0, 64]] if width == 128 else [[0, 32]]
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], *wide, [8, 0]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, width],
    )  # fmt: skip


@gluon.jit
def _tokens(order_ptr, rows, row_inside, HAS_ORDER: gl.constexpr):
    """Where the results of rows go."""
    if HAS_ORDER:
        return gl.load(order_ptr + rows, mask=row_inside, other=0)
    return rows.to(gl.int64)


@gluon.jit
def _limits(
    bounds, batch, head, q_start, within, highest, BOUND: gl.constexpr, HAS_BIAS: gl.constexpr
):
    """What the scores of rows are above to begin with, or never above.

    Args:
        highest: bias of their entries.
    """
    norm_ptr, longest_ptr, n_heads, n_queries, scale_log2, floor = bounds
    if BOUND:
        pair = batch.to(gl.int64) * n_heads + head
        rows = q_start + within
        m_i = gl.load(norm_ptr + pair * n_queries + rows, mask=rows < n_queries, other=0.0)
        m_i = m_i * (gl.load(longest_ptr + pair) * scale_log2)
        if HAS_BIAS:
            m_i += highest
        return m_i
    return gl.full([ROWS], 1.0, gl.float32, within.type.layout) * floor


@gluon.jit
def _write(
    sums, m_i, l_i, steps, tokens, row_inside, outs, out_stride_n, lses,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BOUND: gl.constexpr,
):  # fmt: skip
    """Writes the result of some rows where their tokens stand."""
    # One without entries has read a block that it has no part in.
    empty = (l_i == 0.0) | (steps == 0)
    l_safe = gl.where(empty, 1.0, l_i)
    lse = gl.where(empty, float("-inf"), (m_i + gl.log2(l_safe)) * 0.6931471805599453)
    if BOUND:
        # As in `_hopper.py`: too little is left of the weights, or they are no numbers.
        lse = gl.where((l_i >= 2.6e-26) | (steps == 0), lse, float("inf"))
    gl.store(lses + tokens, lse, mask=row_inside)

    by_row: gl.constexpr = gl.SliceLayout(1, sums.type.layout)
    sums = sums * gl.expand_dims(gl.convert_layout(1.0 / l_safe, by_row), 1)
    # A weight of 0 hides no NaN.
    sums = gl.where(gl.expand_dims(gl.convert_layout(empty, by_row), 1), 0.0, sums)
    stored: gl.constexpr = _stored(BLOCK_D)
    by_stored_row: gl.constexpr = gl.SliceLayout(1, stored)
    cols = gl.expand_dims(gl.arange(0, BLOCK_D, gl.SliceLayout(0, stored)), 0)
    to = gl.expand_dims(gl.convert_layout(tokens, by_stored_row), 1)
    inside = gl.expand_dims(gl.convert_layout(row_inside, by_stored_row), 1)
    laid = gl.convert_layout(sums.to(outs.dtype.element_ty), stored)
    gl.store(outs + to * out_stride_n + cols, laid, mask=inside & (cols < D))
