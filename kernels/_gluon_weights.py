"""Of the Hopper kernel in Gluon: from the scores of a block to what multiplies its values."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

#: One for every 32 keys of a block.
WORDS = gl.constexpr(4)


@gluon.jit
def _marks(pointers, entry, read, partial, HAS_BIAS: gl.constexpr, HAS_WORDS: gl.constexpr):
    """Bias of an entry, as a power of 2, whether words mask it, and these.

    Asked for while the products run: a warpgroup has nothing else to do then.

    Args:
        read: whether there is such an entry.
        partial: whether it is among those that words are for.
    """
    bias_ptr, words_ptr = pointers
    bias = gl.load(bias_ptr + entry, mask=read, other=0.0) if HAS_BIAS else 0.0
    masked = partial & read if HAS_WORDS else False
    if HAS_WORDS:
        words_ptr += entry.to(gl.int64) * WORDS
        words = (
            gl.load(words_ptr, mask=masked, other=0),
            gl.load(words_ptr + 1, mask=masked, other=0),
            gl.load(words_ptr + 2, mask=masked, other=0),
            gl.load(words_ptr + 3, mask=masked, other=0),
        )
    else:
        words = (0, 0, 0, 0)
    return bias, masked, words


@gluon.jit
def _read(scores, masked, words):
    """Scores with those of keys hidden that the words leave out."""
    if masked:
        a, b, c, d = words
        layout: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
        key = gl.arange(0, scores.shape[1], layout)
        word = gl.where(key < 64, gl.where(key < 32, a, b), gl.where(key < 96, c, d))
        read = gl.expand_dims((word >> (key % 32)) & 1, 0)
        scores = gl.where(read != 0, scores, float("-inf"))
    return scores


@gluon.jit
def _shown(scores, length):
    """Scores with those behind the end of a short key block hidden."""
    BLOCK_N: gl.constexpr = scores.shape[1]
    if length < BLOCK_N:
        layout: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
        within = gl.arange(0, BLOCK_N, layout)
        inside = gl.expand_dims(within < length, 0)
        scores = gl.where(inside, scores, float("-inf"))
    return scores


@gluon.jit
def _weighed(
    scores, m_i, length, marks, scale_log2, dtype: gl.constexpr, of_p: gl.constexpr,
    RAGGED: gl.constexpr, BOUND: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_WORDS: gl.constexpr,
):  # fmt: skip
    """Weights of a block as a product takes them, their sums, and what they are relative to: the
    bound, or the highest score so far.

    Args:
        marks: of `_marks`.
    """
    bias, masked, words = marks
    if RAGGED:
        scores = _shown(scores, length)
    if HAS_WORDS:
        scores = _read(scores, masked, words)
    if not BOUND:
        highest = gl.max(scores, 1) * scale_log2
        if HAS_BIAS:
            highest += bias
        m_i = gl.maximum(m_i, highest)
        if RAGGED or HAS_WORDS:  # finite for a row that has seen no key yet, so that no NaN arises
            m_i = gl.maximum(m_i, -1e30)
    top = m_i
    if HAS_BIAS:
        top -= bias
    p = gl.exp2(scores * scale_log2 - gl.expand_dims(top, 1))
    return gl.convert_layout(p.to(dtype), of_p), gl.sum(p, 1), m_i
