"""The simulator's counts are those of plans, and its figures those that were published."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from dit_sparse.block_times import ROW, WHOLE
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.mask_product import COLUMNS
from dit_sparse.method import CallContext
from dit_sparse.methods.window import WindowMethod
from dit_sparse.neighbourhood import Neighbourhood
from dit_sparse.simulator import Candidate, Simulator
from dit_sparse.tiling import best_tile_for

Q = torch.empty(1, 1, 1, 1)


def assert_counts(simulator: Simulator, candidate: Candidate) -> None:
    """The numbers of a candidate against the lists of the plan."""
    method = WindowMethod(
        window=simulator.window,
        dilation=simulator.dilation,
        causal=simulator.causal,
        borders=simulator.borders,
        stride=candidate.stride,
        tile=candidate.tile,
        block=simulator.block,
    )
    layout = TokenLayout.of(simulator.grid, text_last=simulator.text)
    plan = method.plan(Q, Q, CallContext(layout))
    assert candidate.blocks == plan.q_blocks.n
    assert (candidate.full, candidate.partial) == (int(plan.full.sum()), int(plan.partial.sum()))
    assert candidate.masked_blocks == int((plan.partial > 0).sum())
    picture = candidate.blocks - -(-simulator.text // simulator.block)
    assert candidate.worst == int((plan.full + plan.partial)[0, 0, :picture].max())
    assert candidate.density == pytest.approx(plan.density, rel=1e-9)
    lengths = plan.q_blocks.lengths[:picture]
    assert candidate.whole == bool((lengths == simulator.block).all())
    if candidate.partial:
        assert (plan.mask_product is not None) == (candidate.classes < COLUMNS)


@pytest.mark.parametrize("seed", range(40))
def test_counts_are_those_of_the_plan(seed: int) -> None:
    draw = random.Random(seed)
    extents = [draw.randint(1, n) for n in (5, 12, 14)]
    window = [draw.randint(1, extent) for extent in extents]
    stride = tuple(draw.randint(1, w) for w in window)
    block = draw.choice((64, 128))
    tile = tuple(draw.randint(1, min(extent, 4)) for extent in extents)
    text = draw.choice((0, 1, 77, 200))
    simulator = Simulator(TokenGrid(*extents), tuple(window), block, text)  # type: ignore[arg-type]
    assert_counts(simulator, simulator.count(tile, stride))  # type: ignore[arg-type]
    for candidate in draw.sample(simulator.candidates(), 3):
        assert_counts(simulator, candidate)


@pytest.mark.parametrize("seed", range(20))
def test_counts_of_dilated_causal_and_truncated_windows(seed: int) -> None:
    draw = random.Random(seed)
    extents = [draw.randint(1, n) for n in (5, 12, 14)]
    dilation = tuple(draw.randint(1, min(3, n)) for n in extents)
    simulator = Simulator(
        TokenGrid(*extents),
        tuple(draw.randint(1, n // d) for n, d in zip(extents, dilation, strict=True)),  # type: ignore[arg-type]
        block=64,
        text=draw.choice((0, 77)),
        dilation=dilation,  # type: ignore[arg-type]
        causal=tuple(draw.random() < 0.5 for _ in extents),  # type: ignore[arg-type]
        borders=draw.choice(("inward", "truncated")),
    )
    for candidate in draw.sample(simulator.candidates(), 4):
        assert_counts(simulator, candidate)
    layout = TokenLayout.of(simulator.grid, text_last=simulator.text)
    exact = WindowMethod(
        window=simulator.window,
        dilation=simulator.dilation,
        causal=simulator.causal,
        borders=simulator.borders,
    ).plan(Q, Q, CallContext(layout))
    assert simulator.limit == pytest.approx(1 / float(exact.to_mask().float().mean()), rel=1e-5)


def test_strides_of_many_tiles_are_tried_where_they_cost_no_more() -> None:
    found = Simulator(TokenGrid(30, 48, 80), (18, 24, 24)).candidates(tiles=[(2, 8, 8)])
    strides = {c.stride: c.visited for c in found}
    assert strides[16, 8, 8] == strides[2, 8, 8] == min(strides.values())
    assert len(strides) < 20


@pytest.mark.parametrize(
    ("grid", "window", "tile", "stride", "bound", "worst", "full"),
    [
        # FLUX at 4K and HunyuanVideo as in the GNA paper (arXiv 2504.16922), where "worst" is what
        # its simulator says.
        ((1, 256, 256), (1, 80, 80), (1, 16, 8), (1, 1, 1), 7.51, 6.65, 0.50),
        ((1, 256, 256), (1, 80, 80), (1, 8, 8), (1, 1, 1), 8.96 / 4, 8.46 / 2, 0.76),
        ((1, 256, 256), (1, 80, 80), (1, 16, 8), (1, 16, 8), 9.58, 9.31, 0.87),
        ((1, 256, 256), (1, 80, 80), (1, 16, 8), (1, 16, 16), 10.24, 10.24, 1.0),
        ((30, 48, 80), (18, 24, 24), (2, 8, 8), (1, 1, 1), 5.44, 3.60, 0.17),
        ((30, 48, 80), (18, 24, 24), (2, 8, 8), (16, 8, 8), 11.11, 11.11, 1.0),
        ((21, 45, 80), (21, 15, 24), (3, 5, 8), (3, 5, 8), 8.80, 9.38, 1.0),
    ],
)
def test_published_figures(
    grid: tuple[int, int, int],
    window: tuple[int, int, int],
    tile: tuple[int, int, int],
    stride: tuple[int, int, int],
    bound: float,
    worst: float,
    full: float,
) -> None:
    found = Simulator(TokenGrid(*grid), window).count(tile, stride)
    assert found.bound == pytest.approx(bound, rel=2e-3)
    assert found.worst_bound == pytest.approx(worst, rel=2e-3)
    assert found.full / found.visited == pytest.approx(full, abs=5e-3)


def test_limit_is_the_share_of_visible_pairs() -> None:
    assert Simulator(TokenGrid(1, 256, 256), (1, 80, 80)).limit == pytest.approx(10.24)
    grid, text = TokenGrid(1, 6, 7), 5
    mask = torch.ones(47, 47)
    mask[:42, :42] = 0
    for row in range(42):
        mask[row, :6] = 1  # any six keys: a window has as many everywhere
    assert Simulator(grid, (1, 2, 3), text=text).limit == pytest.approx(47**2 / float(mask.sum()))


@pytest.mark.parametrize("window", [(9, 15, 24), (3, 45, 80), (21, 7, 9)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (3, 5, 8)])
def test_best_tile_is_the_one_that_the_method_takes(
    window: tuple[int, int, int], stride: tuple[int, int, int]
) -> None:
    grid = TokenGrid(21, 45, 80)
    best = Simulator(grid, window).candidates(strides=[stride])[0]
    axes = tuple(map(Neighbourhood, grid.shape, window, stride))
    assert best.tile == best_tile_for((axes,), 128)


def test_dense_is_no_speedup() -> None:
    grid = TokenGrid(4, 8, 16)
    found = Simulator(grid, grid.shape, text=128).count((1, 8, 16), (1, 1, 1))
    assert (found.bound, found.worst_bound, found.speedup) == (1.0, 1.0, 1.0)
    assert (found.density, found.partial) == (1.0, 0)


def test_masked_and_short_entries_cost_more(monkeypatch: pytest.MonkeyPatch) -> None:
    simulator = Simulator(TokenGrid(8, 16, 16), (4, 8, 8))
    exact, shared = (simulator.count((2, 8, 8), stride) for stride in ((1, 1, 1), (4, 8, 8)))
    assert shared.partial == shared.masked_blocks == 0
    unmasked = replace(exact, full=exact.visited)
    assert unmasked.speedup > exact.speedup
    assert exact.classes < COLUMNS, "few enough for a product that masks"
    apart = replace(exact, classes=COLUMNS)
    assert exact.speedup > apart.speedup
    assert replace(apart, masked_blocks=0).speedup > apart.speedup
    monkeypatch.setattr("dit_sparse.block_times.BY_PRODUCT", False)
    assert exact.speedup == apart.speedup
    monkeypatch.undo()
    short = simulator.count((2, 4, 8), (4, 8, 8))
    assert replace(short, whole=True).speedup > short.speedup


def test_query_blocks_cost_too() -> None:
    """Entries shrink with a window, query blocks do not."""
    simulators = [Simulator(TokenGrid(1, 64, 64), (1, w, 64)) for w in (6, 26)]
    few, many = (simulator.count((1, 2, 64), (1, 2, 64)) for simulator in simulators)
    assert few.bound == pytest.approx(13 / 3 * many.bound)
    assert few.speedup == pytest.approx((ROW + 13 * WHOLE) / (ROW + 3 * WHOLE) * many.speedup)


def test_bad_input_is_refused() -> None:
    grid = TokenGrid(2, 8, 8)
    for make, sentence in (
        (lambda: Simulator(grid, (3, 8, 8)), "along frames of at most 2"),
        (lambda: Simulator(grid, (2, 8, 8), dilation=(1, 1, 2)), r"along width .* got 8 \* 2"),
        (lambda: Simulator(grid, (2, 8, 8), text=-1), "text of at least 0"),
        (lambda: Simulator(grid, (2, 8, 8), 64).count((2, 8, 8), (1, 1, 1)), "1 to 64 tokens"),
        (
            lambda: Simulator(grid, (2, 4, 4)).count((1, 1, 1), (1, 5, 1)),
            "stride along height of at most 4",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            make()
