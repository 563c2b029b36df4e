"""The rows of a mask product against the masks that plans mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dit_sparse import mask_product
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.mask_product import COLUMNS, FLOOR, MaskProduct
from dit_sparse.method import CallContext
from dit_sparse.methods.window import WindowMethod
from dit_sparse.neighbourhood import Neighbourhood, Partition, Rolled
from dit_sparse.plan import BlockPlan, Blocks
from dit_sparse.window_plan import plan_windows
from tests.problems import Boxes, problems

CPU = torch.device("cpu")


def scores(mask: MaskProduct, head: int, block: int, entry: int) -> Tensor:
    """What is added to the scores of an entry, `[query block, key block]`."""
    query = mask.query[head % len(mask.query), block]
    return mask.queries[query].float() @ mask.keys[mask.entry[entry]].float().T


def check(plan: BlockPlan, mask: MaskProduct) -> None:
    """Every entry of every row, element by element: exactly 0, or below the floor."""
    q_starts, k_starts = plan.q_blocks.starts.tolist(), plan.k_blocks.starts.tolist()
    batch, heads, rows = plan.offsets.shape
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (batch, heads, rows))).tolist():
        first, full = int(plan.offsets[b, h, i]), int(plan.full[b, h, i])
        end = first + full + int(plan.partial[b, h, i])
        q = slice(q_starts[i], q_starts[i + 1])
        keys = plan.indices[first:end].tolist()
        starts = mask.starts[first:end].tolist()
        assert starts == [k_starts[j] for j in sorted(keys)]
        for at, j in enumerate(sorted(keys), first):
            k = slice(k_starts[j], k_starts[j + 1])
            visible = torch.zeros(q.stop - q.start, plan.k_blocks.size, dtype=torch.bool)
            seen = True if j in keys[:full] else plan.element_mask(h, q, k)
            visible[:, : k.stop - k.start] = seen
            added = scores(mask, h, i, at)[: q.stop - q.start]
            assert torch.equal(added == 0, visible), (b, h, i, j)
            assert bool((added[~visible] < FLOOR).all())


@given(problems())
def test_random_boxes(problem) -> None:
    plan = problem.plan
    mask = plan.mask_product
    if plan.box is None or not bool(plan.partial.any()):
        assert mask is None
    elif plan.box.heads not in (1, plan.offsets.shape[1]):
        assert mask is None, "one list for heads that see different keys"
    else:
        assert mask is not None, "blocks of 8 have 8 classes on each of two axes"
        check(plan, mask)


@st.composite
def window_plans(draw: st.DrawFn) -> BlockPlan:
    """Windows of all kinds, some different from head to head, over blocks with short ones."""
    extents = [draw(st.integers(1, most)) for most in (3, 9, 11)]
    dilation = [draw(st.integers(1, min(extent, 3))) for extent in extents]
    shift = [draw(st.integers(0, extent - 1)) for extent in extents]
    kind = draw(st.sampled_from(["inward", "truncated", "causal", "rolled", "partition"]))
    heads = draw(st.sampled_from([1, 3]))

    def axis(n: int, d: int, s: int):
        window = draw(st.integers(1, n // d))
        if kind == "partition":
            return Partition(n, window, s % window)
        causal, stride = kind == "causal", draw(st.integers(1, window))
        borders = "truncated" if kind == "truncated" else "inward"
        one = Neighbourhood(n, window, stride, d, causal=causal, borders=borders)
        return Rolled(one, s) if kind == "rolled" else one

    windows = [tuple(map(axis, extents, dilation, shift)) for _ in range(heads)]
    tile = tuple(draw(st.integers(1, min(extent, 4))) for extent in extents)
    text = {"text_first": draw(st.integers(0, 9)), "text_last": draw(st.integers(0, 9))}
    layout = TokenLayout.of(TokenGrid(*extents), **text)
    return plan_windows(layout, windows, tile, draw(st.sampled_from([8, 16, 64])), CPU)


@given(window_plans())
def test_windows(plan: BlockPlan) -> None:
    mask = plan.mask_product
    assert (mask is None) == (not plan.partial.any()), "tiles have at most 4 + 4 + 3 classes"
    if mask is not None:
        check(plan, mask)


@pytest.mark.parametrize(
    ("grid", "window", "tile", "stride", "classes", "patterns"),
    [
        # A window that moves inwards has the same ends for all queries next to a border.
        ((1, 256, 256), (1, 80, 80), (1, 8, 16), 1, 24, 21),
        ((30, 48, 80), (18, 24, 24), (2, 8, 8), 1, 18, 147),
        ((21, 45, 80), (9, 15, 24), (3, 5, 8), 1, 16, 343),
        ((1, 64, 64), (1, 24, 24), (1, 8, 16), (1, 4, 4), 6, 35),
    ],
)
def test_few_blocks_of_keys_are_different(grid, window, tile, stride, classes, patterns) -> None:
    method = WindowMethod(window=window, stride=stride, tile=tile)
    q = torch.empty(1, 1, 1, 1)
    mask = method.plan(q, q, CallContext(TokenLayout.of(TokenGrid(*grid)))).mask_product
    assert mask is not None
    assert len(mask.keys) == patterns
    used = (mask.queries != 0).flatten(0, 1).any(0).sum()
    assert int(used) == 1 + classes


def one_axis(total: int, block: int) -> BlockPlan:
    """A window along one axis, over blocks with as many classes as queries."""
    layout = TokenLayout.of(TokenGrid(1, 1, total))
    axes = (Neighbourhood(1, 1), Neighbourhood(1, 1), Neighbourhood(total, total // 3))
    return plan_windows(layout, [axes], (1, 1, block), block, CPU)


def test_no_more_classes_than_columns() -> None:
    assert one_axis(300, COLUMNS - 1).mask_product is not None
    assert one_axis(300, COLUMNS).mask_product is None


@pytest.mark.parametrize("limit", ["_MOST_PATTERNS", "_MOST_COMPARED"])
def test_no_more_blocks_than_pay(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = one_axis(300, 16)
    assert plan.mask_product is not None
    monkeypatch.setattr(mask_product, limit, 2)
    assert MaskProduct.of(plan) is None


def test_nothing_to_mask() -> None:
    blocks = Blocks.uniform(20, 8)
    every = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    assert BlockPlan.from_mask(every, blocks, blocks).mask_product is None
    box = Boxes.random((3,), 1, 20, 20, seed=0).packed()
    full = BlockPlan.from_mask(every, blocks, blocks, full=every, box=box)
    assert full.mask_product is None
    some = replace(full, full=full.full - 1, partial=full.partial + 1)
    assert some.mask_product is not None


def test_real_products_do_not_reach_the_floor() -> None:
    """Nor does what is hidden rise above it: both sides have as much room."""
    assert FLOOR == -(2.0**29)
    assert float(torch.tensor(-FLOOR).sqrt().to(torch.float8_e5m2)) < 2.0**15
