"""Random layouts and grids for tests of methods."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from dit_sparse.grid import TextSpan, TokenGrid, TokenLayout
from dit_sparse.method import CallContext, SparseMethod
from dit_sparse.plan import BlockPlan
from dit_sparse.plan_check import check


def plan_on(
    method: SparseMethod, layout: TokenLayout | TokenGrid, step: int | None = None, layer: int = 0
) -> BlockPlan:
    """The plan of a method that does not look at q and k."""
    layout = TokenLayout((layout,)) if isinstance(layout, TokenGrid) else layout
    q = torch.empty(1, 1, 1, 1)
    return check(method.plan(q, q, CallContext(layout, layer=layer, layers=layer + 1, step=step)))


@st.composite
def grids(draw: st.DrawFn, most: int = 60) -> TokenGrid:
    shapes = st.tuples(*[st.integers(1, 7)] * 3).filter(lambda s: math.prod(s) <= most)
    return TokenGrid(*draw(shapes))


@st.composite
def layouts(draw: st.DrawFn, grid: TokenGrid) -> TokenLayout:
    """Text before and after a grid, padded or not, and reference images."""
    batch = draw(st.sampled_from([1, 2]))

    def text() -> list[TextSpan]:
        length = draw(st.integers(0, 4))
        padded = draw(st.booleans())
        valid = tuple(draw(st.integers(0, length)) for _ in range(batch)) if padded else None
        return [TextSpan(length, valid)]

    references = draw(st.sampled_from([[], [TokenGrid(1, 2, 2)], [TokenGrid(1, 1, 3)] * 2]))
    return TokenLayout((*text(), grid, *references, *text()))
