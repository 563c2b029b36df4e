"""Plans chosen in Triton's interpreter, against the rules in PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_sparse import pyramid, selection
from dit_sparse.frame import Frame
from dit_sparse.plan import BlockPlan, Blocks
from dit_sparse.plan_check import check
from tests.selection_cases import frame

choosing = pytest.importorskip("dit_sparse.kernels.choose")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter"),
    pytest.mark.usefixtures("poisoned"),
]
all_layouts = pytest.mark.parametrize("layout", ["ragged", "padding", "reference", "one token"])


def same_spans(plan: BlockPlan) -> None:
    """Every entry, also those behind the last of a row, has the span that the lists say."""
    for got, expected in zip(plan.spans, replace(plan).spans, strict=True):
        assert torch.equal(got, expected)


def scores_of(n: int, seed: int = 0) -> Tensor:
    """Scores of both signs, some of them equal and one -inf in every row."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 1, n, n, generator=generator)
    scores[..., ::3] = scores[..., ::3].round()
    scores[1] *= 1e-6
    if n > 4:
        scores[..., 2] = -torch.inf
    return scores


@all_layouts
@pytest.mark.parametrize(("count", "tail"), [(1, "none"), (3, "first")])
def test_the_highest(layout: str, count: int, tail: str):
    cut = frame(layout, block=32)
    count = min(count, cut.candidates)
    scores = selection.of_picture(scores_of(cut.blocks.n), cut)
    got = check(choosing.choose(scores, cut, (count,), tail=tail))
    if cut.hidden is not None:
        scores = scores.masked_fill(cut.hidden[:, None, None], -torch.inf)
    ranked = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, ranked, True)
    chosen &= scores > -torch.inf
    expected = selection.plan_of_selection(chosen.to(torch.uint8), cut, tail=tail)
    assert torch.equal(got.visited, expected.visited)
    assert torch.equal(got.full, expected.full)
    same_spans(got)
    assert torch.equal(got.to("cpu").listed("full"), expected.visited)


@all_layouts
@pytest.mark.parametrize("shares", [(0.2, 0.4, 0.6, 0.8), (0.0, 0.5, 0.5, 1.0)])
def test_levels(layout: str, shares: tuple[float, ...]):
    cut = frame(layout, block=32)
    scores = selection.of_picture(scores_of(cut.blocks.n), cut)
    by_factor = dict(zip((1, 2, 4, 8), shares, strict=True))
    level = pyramid.levels(scores, by_factor, "quantile", candidates=cut.candidates)
    expected = selection.plan_of_selection(level, cut, factors=(2, 4, 8))
    ends = tuple(int(share * cut.candidates + 1e-9) for share in shares)
    got = check(choosing.choose(scores, cut, ends, factors=(2, 4, 8)))
    assert torch.equal(got.full, expected.full)
    assert torch.equal(got.pools.counts, expected.pools.counts)
    same_spans(got)
    for part in ("full", "pooled"):
        assert torch.equal(got.listed(part), expected.listed(part))


@all_layouts
@pytest.mark.parametrize("mass", [0.1, 0.9])
def test_by_mass(layout: str, mass: float):
    cut = frame(layout, block=32)
    scores = torch.randn(
        2, 2, cut.blocks.n, cut.blocks.n, generator=torch.Generator().manual_seed(1)
    )
    scores = selection.of_picture(scores, cut)
    got = check(choosing.choose(scores, cut, (cut.candidates,), mass=mass))
    chosen = selection.top_p(scores, mass)
    expected = selection.plan_of_selection(chosen.to(torch.uint8), cut)
    assert torch.equal(got.visited, expected.visited)
    same_spans(got)


def test_more_entries_than_32_bits_number():
    n = 4096
    blocks = Blocks.uniform(n, 1)
    none = torch.zeros(n, dtype=torch.bool)
    given = Frame(blocks, None, none, None, none, n)
    scores = torch.empty(8, 16, n, n, device="meta")
    with pytest.raises(ValueError, match="entries in a plan, got 2147483648"):
        choosing.choose(scores, given, (n,), mass=0.9)
