"""Grids, layouts and permutations."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.grid import Permutation, TextSpan, TokenGrid, TokenLayout

lengths = st.integers(1, 12)
seeds = st.integers(0, 10_000)


def permutation(length: int, heads: int | None, seed: int) -> Permutation:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(length, generator=generator) for _ in range(heads or 1)]
    return Permutation(torch.stack(rows) if heads else rows[0])


class TestTokenGrid:
    @pytest.mark.parametrize(
        ("text", "shape"),
        [("21x45x80", (21, 45, 80)), ("64x32", (1, 64, 32)), ("13X30X45", (13, 30, 45))],
    )
    def test_parse(self, text, shape):
        grid = TokenGrid.parse(text)
        assert grid.shape == shape
        assert TokenGrid.parse(str(grid)) == grid

    @pytest.mark.parametrize("text", ["", "64", "1x2x3x4", "ax4", "-1x4", "4x", "1.5x4", "0x4"])
    def test_parse_refuses(self, text):
        with pytest.raises(ValueError, match="Expected"):
            TokenGrid.parse(text)

    @pytest.mark.parametrize("shape", [(0, 1, 1), (1, -1, 1), (1, 1, 2.0)])
    def test_refuses_extents(self, shape):
        with pytest.raises(ValueError, match="of a token grid"):
            TokenGrid(*shape)

    def test_coordinates_are_frame_major(self):
        grid = TokenGrid(2, 3, 4)
        expected = [(f, h, w) for f in range(2) for h in range(3) for w in range(4)]
        assert [tuple(c) for c in grid.coordinates().tolist()] == expected
        assert grid.length == len(expected)


class TestTokenLayout:
    def test_spans_and_starts(self):
        grid, reference = TokenGrid(2, 2, 2), TokenGrid(1, 1, 3)
        layout = TokenLayout.of(grid, 5, 4, reference)
        assert [start for start, _ in layout.spans()] == [0, 5, 13, 16]
        assert (layout.length, layout.grid_start, layout.grid) == (20, 5, grid)
        assert layout.without_text() == TokenLayout((grid, reference))

    def test_empty_spans_do_not_make_another_layout(self):
        grid = TokenGrid(1, 2, 2)
        assert TokenLayout.of(grid) == TokenLayout((grid,))
        assert hash(TokenLayout.of(grid)) == hash(TokenLayout((grid,)))

    def test_text_without_padding_is_one_layout(self):
        grid = TokenGrid(1, 2, 2)
        padded = TokenLayout((TextSpan(3, valid=(3, 3)), grid))
        assert padded == TokenLayout.of(grid, text_first=3)
        assert padded.batch is None

    def test_needs_a_grid(self):
        with pytest.raises(ValueError, match="at least one grid"):
            TokenLayout((TextSpan(4),))

    def test_refuses_two_batch_sizes(self):
        with pytest.raises(ValueError, match="one batch size"):
            TokenLayout((TextSpan(4, (1,)), TokenGrid(1, 1, 1), TextSpan(4, (1, 2))))

    @pytest.mark.parametrize("valid", [(5,), (-1,), (2, 9)])
    def test_refuses_valid_lengths(self, valid):
        with pytest.raises(ValueError, match="valid text lengths"):
            TextSpan(4, valid)

    @given(st.lists(st.tuples(st.booleans(), lengths, st.integers(0, 12)), min_size=1, max_size=5))
    def test_valid_ranges_are_the_real_keys(self, parts):
        segments = [
            TextSpan(n, (min(valid, n), n)) if text else TokenGrid(1, 1, n)
            for text, n, valid in parts
        ]
        layout = TokenLayout((*segments, TokenGrid(1, 1, 1)))
        for entry in range(2):
            real = []
            for segment in layout.segments:
                padded = isinstance(segment, TextSpan) and segment.valid is not None
                count = segment.valid[entry] if padded else segment.length
                real += [True] * count + [False] * (segment.length - count)
            ranges = layout.valid_ranges(entry)
            got = [any(a <= i < b for a, b in ranges) for i in range(layout.length)]
            assert got == real
            edges = [edge for r in ranges for edge in r]
            assert edges == sorted(set(edges)), "ranges touch, overlap or are empty"


class TestPermutation:
    @given(lengths, st.sampled_from([None, 1, 3]), seeds)
    def test_undo_restores(self, length, heads, seed):
        order = permutation(length, heads, seed).check()
        x = torch.randn(2, heads or 3, length, 4)
        assert torch.equal(order.undo(order(x)), x)
        assert torch.equal(order(order.undo(x)), x)

    def test_index_names_the_old_position(self):
        order = Permutation(torch.tensor([[2, 0, 1], [1, 2, 0]]))
        x = torch.tensor([[[10, 11, 12], [20, 21, 22]]])
        assert order(x).tolist() == [[[12, 10, 11], [21, 22, 20]]]

    @given(lengths, st.sampled_from([None, 3]), st.sampled_from([None, 1, 3]), seeds)
    def test_then(self, length, first, second, seed):
        p, r = permutation(length, first, seed), permutation(length, second, seed + 1)
        x = torch.randn(1, 3, length)
        assert torch.equal(p.then(r)(x), r(p(x)))

    def test_then_refuses_another_length(self):
        with pytest.raises(ValueError, match="to follow"):
            permutation(5, None, 0).then(permutation(4, None, 0))

    @pytest.mark.parametrize("index", [[0, 0, 1], [0, 1, 3], [-1, 0, 1]])
    def test_check_refuses(self, index):
        with pytest.raises(ValueError, match="repeated or missing"):
            Permutation(torch.tensor(index)).check()

    @pytest.mark.parametrize(
        "index", [torch.arange(3, dtype=torch.int32), torch.zeros(1, 1, 3, dtype=torch.int64)]
    )
    def test_refuses_dtype_and_shape(self, index):
        with pytest.raises(ValueError, match="int64"):
            Permutation(index)

    @pytest.mark.parametrize("shape", [(1, 2, 6, 3), (1, 2, 4), (1, 3, 5), (5, 5)])
    def test_refuses_other_tensors(self, shape):
        # A longer tensor would lose its last tokens without this.
        order = permutation(5, 2, 0)
        with pytest.raises(ValueError, match="2 heads"):
            order(torch.zeros(shape))
        with pytest.raises(ValueError, match="2 heads"):
            order.undo(torch.zeros(shape))

    def test_keeps_its_inverse_where_it_is(self):
        order = permutation(5, None, 0)
        assert order.to("cpu") is order


def test_a_permutation_of_one_head_is_shared_and_rows_are_contiguous():
    index = torch.randperm(6)
    assert torch.equal(Permutation(index[None]).index, index)
    per_head = torch.stack([torch.randperm(6), torch.randperm(6)], dim=1).mT
    assert Permutation(per_head).index.is_contiguous()
    assert torch.equal(Permutation(per_head).index, per_head)
