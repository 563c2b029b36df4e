"""Scores of block pairs and the rules that choose by them, against loops and identities."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_sparse import pyramid, selection
from dit_sparse.frame import even_tile, frame_of
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.importance import sampled_importance, sampled_tokens
from dit_sparse.plan import Blocks
from tests.selection_cases import LAYOUTS, frame, levels_by_loop, ordered, qkv, ranges

all_layouts = pytest.mark.parametrize("layout", LAYOUTS)
scores_of_rows = st.integers(0, 10_000).map(
    lambda seed: torch.randn(2, 3, 4, 9, generator=torch.Generator().manual_seed(seed))
)


class TestFrame:
    @all_layouts
    @pytest.mark.parametrize("order", ["raster", "tile", "hilbert", "HWF"])
    def test_no_block_mixes_the_picture_with_text_or_padding(self, layout: str, order: str):
        given_layout, cut = LAYOUTS[layout], frame(layout, order=order)
        start = given_layout.grid_start
        stop = start + given_layout.grid.length
        token = torch.arange(given_layout.length) if cut.order is None else cut.order.index
        for j, block in enumerate(ranges(cut.blocks)):
            positions = token[list(block)]
            inside = (positions >= start) & (positions < stop)
            assert bool(inside.all()) or not bool(inside.any())
            assert bool(cut.context[j]) == (not bool(inside.any()))
            for entry in range(given_layout.batch or 1):
                real = torch.zeros(given_layout.length, dtype=torch.bool)
                for a, b in given_layout.valid_ranges(entry) if given_layout.batch else [(0, None)]:
                    real[a:b] = True
                hidden = cut.hidden is not None and bool(cut.hidden[entry, j])
                assert hidden == (not bool(real[positions].any()))
                assert hidden or bool(real[positions].all())

    def test_even_tiles(self):
        assert even_tile(TokenGrid(1, 64, 64), 64) == (1, 8, 8)
        assert even_tile(TokenGrid(21, 45, 80), 64) == (4, 4, 4)
        assert even_tile(TokenGrid(21, 45, 80), 128) == (4, 4, 8)
        assert even_tile(TokenGrid(2, 3, 90), 64) == (2, 4, 8)
        assert even_tile(TokenGrid(1, 1, 1), 64) == (1, 1, 1)

    def test_blocks_of_flux_are_its_tiles(self):
        """Section 3.7: 64 x 64 image tokens as 8 x 8 tiles, one tile a block."""
        cut = frame_of(TokenLayout.of(TokenGrid(1, 64, 64), 512), 64, "tile")
        assert cut.blocks.n == 72
        assert cut.candidates == 64
        tile = cut.order.index[512 + 64 : 512 + 128] - 512
        assert sorted(set((tile % 64).tolist())) == list(range(8, 16))
        assert sorted(set((tile // 64).tolist())) == list(range(8))


class TestScores:
    @all_layouts
    @pytest.mark.parametrize("order", ["raster", "hilbert"])
    def test_means_are_over_real_counts(self, layout: str, order: str):
        cut = frame(layout, order=order)
        q, k, _ = qkv(layout)
        got = selection.pooled_scores(q, k, cut)

        def means(x: Tensor) -> Tensor:
            rows = ordered(x, cut).double()
            return torch.stack([rows[:, :, list(b)].mean(2) for b in ranges(cut.blocks)], 2)

        mean_q, mean_k = means(q), means(k)
        expected = mean_q @ mean_k.transpose(-2, -1) / math.sqrt(16)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)

    def test_grouped_heads_share_keys(self):
        cut = frame("image")
        q, k, _ = qkv("image", heads=4)
        got = selection.pooled_scores(q, k[:, ::2], cut)
        expected = selection.pooled_scores(q, k[:, [0, 0, 2, 2]], cut)
        torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("centred", [False, True])
    def test_covariance_norms(self, centred: bool):
        cut = frame("ragged")
        _, k, v = qkv("ragged")
        got = selection.covariance_norms(k, v, cut, centred=centred)
        each = []
        for block in ranges(cut.blocks):
            keys, values = (ordered(x, cut).double()[:, :, list(block)] for x in (k, v))
            each.append(torch.einsum("bhtd,bhte->bhde", keys - keys.mean(2, True), values))
        matrices = torch.stack(each, dim=2)
        if centred:
            matrices = matrices - matrices.mean(2, keepdim=True)
        torch.testing.assert_close(got.double(), matrices.norm(dim=(-2, -1)), rtol=1e-4, atol=1e-4)


class TestRules:
    @given(scores_of_rows, st.integers(1, 12))
    def test_top_k(self, scores: Tensor, count: int):
        scores[..., 5] = -torch.inf
        chosen = selection.top_k(scores, count)
        assert bool((chosen.sum(-1) == min(count, 8)).all())
        worst = scores.masked_fill(~chosen, torch.inf).amin(-1)
        best = scores.masked_fill(chosen, -torch.inf).amax(-1)
        assert bool((worst >= best).all())

    @given(scores_of_rows, st.sampled_from([0.01, 0.3, 0.7, 0.95, 1.0]))
    def test_top_p_is_the_fewest_blocks_that_hold_the_mass(self, scores: Tensor, mass: float):
        scores[..., 2] = -torch.inf
        chosen = selection.top_p(scores, mass)
        for row, picked in zip(scores.view(-1, 9), chosen.view(-1, 9), strict=True):
            share = row.double().softmax(-1)
            held, least, most = 0.0, set(), set()
            for j in share.argsort(descending=True).tolist():
                if share[j] > 0 and held < mass - 1e-6:
                    least.add(j)
                if share[j] > 0 and held < mass + 1e-6:  # sums in fp32 may fall on either side
                    most.add(j)
                held += float(share[j])
            got = set(picked.nonzero().flatten().tolist())
            assert least <= got <= most or mass == 1.0
            assert 2 not in got
            assert float(share[sorted(got)].sum()) >= mass - 1e-5

    def test_masses_are_nested(self):
        scores = torch.randn(2, 2, 5, 30)
        masks = [selection.top_p(scores, p) for p in (0.1, 0.4, 0.8, 1.0)]
        for less, more in itertools.pairwise(masks):
            assert not bool((less & ~more).any())
        assert bool(masks[-1].all())

    def test_a_row_without_candidates_chooses_nothing(self):
        nothing = torch.full((1, 1, 2, 4), -torch.inf)
        assert not selection.top_k(nothing, 2).any()
        assert not selection.top_p(nothing, 0.5).any()

    def test_above(self):
        scores = torch.tensor([[0.0, math.log(0.5), math.log(0.4), -math.inf]])
        assert selection.above(scores, 0.45).tolist() == [[True, True, False, False]]

    def test_forced(self):
        cut = frame("text", block=16, order="raster")
        number = torch.arange(cut.blocks.n)
        near = (number[:, None] - number).abs() <= 1
        assert torch.equal(selection.forced_blocks(cut, ("neighbours",)), near & ~cut.context)
        first = selection.forced_blocks(cut, ("first_frame",))
        # 13 tokens of text are one block; the first frame has 77 of 231 tokens, five blocks of 16.
        assert first[3].nonzero().flatten().tolist() == [1, 2, 3, 4, 5]
        assert selection.forced_blocks(cut, ()) is None
        with pytest.raises(ValueError, match="among self, neighbours, first_frame, got 'sink'"):
            selection.forced_blocks(cut, ("sink",))

    @all_layouts
    def test_a_plan_has_all_text_and_no_padding(self, layout: str):
        cut = frame(layout)
        level = torch.zeros(2, 3, cut.blocks.n, cut.blocks.n, dtype=torch.uint8)
        plan = selection.plan_of_selection(level, cut)
        open_ = torch.ones_like(level, dtype=torch.bool)
        if cut.hidden is not None:
            open_ &= ~cut.hidden[:, None, None]
        always = cut.context[:, None] | cut.context
        assert torch.equal(plan.visited, open_ & always)


class TestLevels:
    @settings(max_examples=80)
    @given(
        st.integers(0, 100_000),
        st.integers(1, 40),
        st.booleans(),
        st.sampled_from([{}, {8: 2}, {4: 2, 8: 4}, {2: 2, 4: 4, 8: 8}]),
        st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.5, 0.8, 1.0]), min_size=4, max_size=4),
    )
    def test_the_rules_of_the_public_code(self, seed, n, mass, multiples, ends):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(3, n, generator=generator, dtype=torch.float64) ** 3
        by_factor = dict(zip((1, 2, 4, 8), sorted(ends), strict=True))
        got = pyramid.levels(scores, by_factor, "mass" if mass else "quantile", multiples=multiples)
        for row, levels in zip(scores.tolist(), got.tolist(), strict=True):
            assert levels == levels_by_loop(row, by_factor, mass, multiples)

    def test_monotone_along_importance(self):
        """S8: a more important block is never read more coarsely."""
        scores = torch.rand(20, 50)
        for allocation in ("quantile", "mass"):
            level = pyramid.levels(scores, {1: 0.2, 2: 0.4, 4: 0.6, 8: 0.8}, allocation).int()
            coarse = torch.where(level == 0, 99, level)
            ranked = coarse.gather(-1, scores.argsort(descending=True))
            assert bool((ranked.diff() >= 0).all())

    def test_mass_one_reads_everything_exactly(self):
        scores = torch.rand(20, 50)
        assert bool((pyramid.levels(scores, {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}, "mass") == 1).all())

    @given(st.integers(0, 10_000), st.integers(0, 3))
    def test_raising_an_end_never_coarsens(self, seed: int, which: int):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(4, 30, generator=generator)
        low = sorted(torch.rand(4, generator=generator).tolist())
        high = list(low)
        high[which] = min(1.0, high[which] + 0.2)
        if high != sorted(high):
            return
        a, b = (
            pyramid.levels(scores, dict(zip((1, 2, 4, 8), e, strict=True)), "mass").int()
            for e in (low, high)
        )
        coarse_a, coarse_b = (torch.where(x == 0, 99, x) for x in (a, b))
        assert bool((coarse_b <= coarse_a).all())

    def test_candidates_are_what_shares_are_of(self):
        scores = torch.rand(5, 20)
        scores[:, 10:] = -torch.inf
        level = pyramid.levels(scores, {1: 0.5, 2: 1.0, 4: 1.0, 8: 1.0}, "quantile", candidates=10)
        assert bool(((level == 1).sum(-1) == 5).all())
        assert bool(((level == 2).sum(-1) == 5).all())
        assert not level[:, 10:].any()


class TestSimilarity:
    def cap(self, k: Tensor, thresholds: dict[int, float], blocks: Blocks | None = None) -> Tensor:
        return pyramid.similarity_cap(k, blocks or Blocks.uniform(k.shape[2], 16), thresholds)

    def test_against_a_loop(self):
        blocks = Blocks.of_runs([40, 3, 16], 16)
        k = torch.randn(2, 3, 59, 4).cumsum(2)
        thresholds = {2: 0.9, 4: 0.8, 8: 0.6}
        got = self.cap(k, thresholds, blocks)
        for b, h, (j, block) in itertools.product(range(2), range(3), enumerate(ranges(blocks))):
            expected = 1
            for g, threshold in thresholds.items():
                cosines = [
                    torch.cosine_similarity(k[b, h, t], k[b, h, t + g - 1], dim=0)
                    for t in range(block.start, block.stop - g + 1, g)
                ]
                if not cosines or sum(cosines) / len(cosines) > threshold:
                    expected = g
            assert got[b, h, j] == expected

    def test_limits(self):
        """S9: a threshold of 1 caps everything, one of -1 nothing, equal keys are never capped."""
        k = torch.randn(1, 2, 64, 8)
        assert bool((self.cap(k, {2: 1.0, 4: 1.0, 8: 1.0}) == 1).all())
        assert bool((self.cap(k, {2: 0.9, 4: 0.9, 8: -1.0}) == 8).all())
        same = k[:, :, :1].expand_as(k)
        assert bool((self.cap(same, {2: 0.99, 4: 0.99, 8: 0.99}) == 8).all())
        assert bool((self.cap(same, {2: 1.0, 4: 1.0, 8: 1.0}) == 1).all())

    def test_capped_levels(self):
        level = torch.tensor([0, 1, 2, 8], dtype=torch.uint8).expand(1, 1, 2, 4)
        cap = torch.tensor([[[2, 8, 4, 2]]], dtype=torch.uint8)
        assert pyramid.capped(level, cap)[0, 0, 0].tolist() == [0, 1, 2, 2]


class TestImportance:
    @all_layouts
    @pytest.mark.parametrize("norm", ["softmax", "max"])
    @pytest.mark.parametrize("share", [1, 4])
    def test_the_closed_form(self, layout: str, norm: str, share: int):
        """S10, for the drawn places; with all of them it is the whole block's maximum."""
        cut = frame(layout, block=16)
        q, k, _ = qkv(layout, heads=2, dim=4)
        got = sampled_importance(q, k, cut, share=share, norm=norm, seed=5)
        at_q, at_k = sampled_tokens(cut, 2, 16 // share, (5, 6))
        for b, h in itertools.product(range(2), range(2)):
            scores = q[b, h, at_q[h].flatten()].double() @ k[b, h, at_k[h].flatten()].double().T / 2
            if cut.hidden is not None:
                unseen = cut.hidden[b].repeat_interleave(16 // share)
                scores = scores.masked_fill(unseen, -torch.inf)
            if norm == "softmax":
                weight = scores.softmax(-1)
            else:
                weight = (scores - scores.amax(-1, keepdim=True)).exp()
            n, m = cut.blocks.n, 16 // share
            pairs = weight.view(n, m, n, m).amax((1, 3))
            expected = pairs / pairs.sum(-1, keepdim=True)
            torch.testing.assert_close(got[b, h].double(), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got.sum(-1), torch.ones_like(got[..., 0]))

    def test_in_parts_it_is_the_same(self, monkeypatch: pytest.MonkeyPatch):
        cut = frame("ragged", block=16)
        q, k, _ = qkv("ragged")
        whole = sampled_importance(q, k, cut)
        monkeypatch.setattr("dit_sparse.importance._CHUNK", 1)
        torch.testing.assert_close(sampled_importance(q, k, cut), whole)

    def test_seeds(self):
        cut = frame("ragged", block=16)
        q, k, _ = qkv("ragged")
        a, b, c = (sampled_importance(q, k, cut, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)

    @all_layouts
    def test_places_lie_in_their_blocks(self, layout: str):
        cut = frame(layout, block=16)
        (tokens,) = sampled_tokens(cut, 2, 4, (0,))
        token = (
            torch.arange(cut.blocks.total).expand(2, -1)
            if cut.order is None
            else cut.order.index.expand(2, -1)
        )
        for h, (j, block) in itertools.product(range(2), enumerate(ranges(cut.blocks))):
            inside = token[h, list(block)].tolist()
            assert set(tokens[h, j].tolist()) <= set(inside)
            if len(block) == 16:
                assert len(set(tokens[h, j].tolist())) == 4
