"""Blocks, boxes and plans against masks built element by element."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_sparse.grid import Permutation
from dit_sparse.levels import plan_of_levels
from dit_sparse.plan import BlockPlan, Blocks, BoxPredicate
from dit_sparse.plan_check import check
from tests.problems import Boxes, blocks_one_by_one, problems, runs, sizes


class TestBlocks:
    @given(runs, sizes)
    def test_blocks_cut_and_never_straddle(self, parts, size):
        blocks = Blocks.of_runs(parts, size)
        edges = set(itertools.accumulate(parts, initial=0))
        pieces = blocks_one_by_one(blocks)
        assert [i for piece in pieces for i in piece] == list(range(sum(parts)))
        for piece in pieces:
            assert 1 <= len(piece) <= size
            assert not edges & set(range(piece.start + 1, piece.stop))
            assert len(piece) == size or piece.stop in edges, "cut short inside a run"
        assert blocks.of_token.tolist() == [i for i, piece in enumerate(pieces) for _ in piece]
        assert blocks.lengths.tolist() == [len(piece) for piece in pieces]
        assert (blocks.n, blocks.total) == (len(pieces), sum(parts))

    def test_uniform(self):
        assert Blocks.uniform(10, 4).starts.tolist() == [0, 4, 8, 10]
        assert Blocks.uniform(8, 4).starts.tolist() == [0, 4, 8]

    @pytest.mark.parametrize(("parts", "size"), [([4], 0), ([4], -2), ([4, -1], 2)])
    def test_refuses(self, parts, size):
        with pytest.raises(ValueError, match="Expected runs"):
            Blocks.of_runs(parts, size)


class TestBoxPredicate:
    @given(
        st.sampled_from([(3,), (1, 4, 2), (0, 5, 6), (7, 0, 0), (2, 2, 2, 2), (9, 9, 10)]),
        st.sampled_from([1, 2]),
        st.integers(0, 10_000),
    )
    def test_mask_compares_axis_by_axis(self, bits, heads, seed):
        boxes = Boxes.random(bits, heads, 11, 13, seed)
        every = slice(None)
        for head in range(2):
            got = boxes.packed().mask(head, every, every)
            assert torch.equal(got, boxes.mask()[head % heads])

    @pytest.mark.parametrize("bits", [(9, 9, 10), (30,), (0, 29)])
    def test_all_corners_at_31_bits(self, bits):
        # Extremes borrow across fields if anything does.
        edges = [sorted({0, 1 % 2**b, 2**b - 1}) for b in bits]
        points = torch.tensor(list(itertools.product(*edges)))
        n = len(points)
        low, high = points.repeat_interleave(n, 0)[None], points.repeat(n, 1)[None]
        boxes = Boxes(bits, low, high, points, torch.zeros(n, dtype=torch.bool))
        assert boxes.packed().guard.bit_length() == 31
        every = slice(None)
        assert torch.equal(boxes.packed().mask(0, every, every), boxes.mask()[0])

    def test_mask_of_chosen_positions(self):
        boxes = Boxes.random((2, 2), 1, 6, 7, seed=1)
        q, k = torch.tensor([4, 0]), torch.tensor([6, 1, 1])
        got = boxes.packed().mask(0, q, k)
        assert torch.equal(got, boxes.mask()[0][q][:, k])
        assert torch.equal(
            boxes.packed().mask(0, slice(1, 3), slice(2, 7)), boxes.mask()[0][1:3, 2:]
        )


class TestFromMask:
    @given(problems())
    def test_visited_and_elements(self, problem):
        assert torch.equal(check(problem.plan).visited, problem.listed)
        assert torch.equal(problem.plan.to_mask(), problem.expected)

    @given(problems())
    def test_density_counts_whole_blocks(self, problem):
        q, k = problem.plan.q_blocks.lengths, problem.plan.k_blocks.lengths
        share = (problem.listed * (q[:, None] * k)).sum((-2, -1)).double() / q.sum() / k.sum()
        assert problem.plan.density == pytest.approx(float(share.mean()), abs=1e-12)

    def test_lists_take_no_more_room_than_they_need(self):
        visited = torch.eye(64, dtype=torch.bool)[None, None].clone()
        visited[..., 0, :] = True  # one row of text
        plan = BlockPlan.from_mask(visited, Blocks.uniform(64, 1), Blocks.uniform(64, 1))
        assert plan.indices.numel() == 64 + 63

    def test_kernels_find_rows_whatever_the_strides(self):
        blocks = Blocks.uniform(4, 2)
        lists = torch.ones(2, 3, 2, dtype=torch.int32)
        plan = BlockPlan(
            q_blocks=blocks,
            k_blocks=blocks,
            indices=torch.zeros(12, dtype=torch.int32)[::2],
            offsets=torch.zeros(2, 3, 2, dtype=torch.int32),
            full=lists.transpose(0, 1).contiguous().transpose(0, 1),
            partial=torch.zeros(1, 1, 1, dtype=torch.int32).expand(2, 3, 2),
        )
        for name in ("indices", "offsets", "full", "partial"):
            assert getattr(plan, name).is_contiguous()
        corner = torch.zeros(1, 8, dtype=torch.int32)[:, ::2]
        box = BoxPredicate(corner, corner, corner[0], corner[0], guard=2)
        for name in ("lower", "upper", "above", "below"):
            assert getattr(box, name).is_contiguous()

    def test_a_box_and_full_blocks_come_together(self):
        visited = torch.ones(1, 1, 1, 2, dtype=torch.bool)
        with pytest.raises(ValueError, match="or neither, got no box"):
            BlockPlan.from_mask(visited, Blocks.uniform(3, 4), Blocks.uniform(6, 4), full=visited)

    @pytest.mark.parametrize(
        "visited",
        [
            torch.ones(1, 1, 2, 2),
            torch.ones(1, 2, 2, dtype=torch.bool),
            torch.ones(1, 1, 3, 2, dtype=torch.bool),
        ],
    )
    def test_refuses_masks(self, visited):
        with pytest.raises(ValueError, match="Expected a bool block mask"):
            BlockPlan.from_mask(visited, Blocks.uniform(4, 2), Blocks.uniform(4, 2))

    @pytest.mark.parametrize(
        "full", [torch.ones(1, 3, 2, 2, dtype=torch.bool), torch.ones(1, 1, 2, 2)]
    )
    def test_refuses_masks_of_full_blocks(self, full):
        visited = torch.ones(1, 1, 2, 2, dtype=torch.bool)
        with pytest.raises(ValueError, match="mask of full blocks"):
            BlockPlan.from_mask(visited, Blocks.uniform(4, 2), Blocks.uniform(4, 2), full=full)


class TestDensity:
    def plan(self) -> BlockPlan:
        visited = torch.tensor([[[[True, True, False], [True, False, False]]]])
        return BlockPlan.from_mask(visited, Blocks.uniform(6, 4), Blocks.uniform(12, 4))

    def test_exact(self):
        assert self.plan().density == pytest.approx((4 * 8 + 2 * 4) / 72)

    def test_pooled_entries_count_their_rows(self):
        level = torch.tensor([[[[1, 4, 0], [2, 0, 0]]]], dtype=torch.uint8)
        plan = plan_of_levels(level, Blocks.uniform(6, 4), Blocks.uniform(12, 4), factors=(2, 4))
        assert check(plan).density == pytest.approx((4 * (4 + 1) + 2 * 2) / 72)

    def test_a_tail_does_not_count_hidden_blocks(self):
        hidden = torch.tensor([[False, False, True]])
        plan = check(replace(self.plan(), tail="zeroth", hidden=hidden))
        assert plan.density == pytest.approx((4 * 8 + 2 * 4 + 2 * 1) / 72)

    def test_a_tail_counts_one_row_for_each_unlisted_block(self):
        plan = replace(self.plan(), tail="zeroth")
        assert plan.density == pytest.approx((4 * 8 + 2 * 4 + 4 * 1 + 2 * 2) / 72)


def test_lists_need_not_lie_one_after_another():
    """Rows may share entries or leave gaps; methods build such lists without sorting."""
    blocks = Blocks.uniform(4, 2)
    plan = BlockPlan(
        q_blocks=blocks,
        k_blocks=blocks,
        indices=torch.tensor([1, 0, 1, 0], dtype=torch.int32),
        offsets=torch.tensor([[[1], [2]]], dtype=torch.int32).expand(1, 2, 2).contiguous(),
        full=torch.tensor([[[2, 2], [1, 0]]], dtype=torch.int32),
        partial=torch.zeros(1, 2, 2, dtype=torch.int32),
    )
    expected = torch.tensor([[[True, True], [True, True]], [[False, True], [False, False]]])
    assert torch.equal(check(plan).visited[0], expected)
    assert plan.density == pytest.approx(5 / 8)


class Widths(TorchDispatchMode):
    """Notes the dtype of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {x.dtype for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        return out


@pytest.mark.parametrize("entries", [[2, 0, 1, 2], []])
def test_spans_take_no_wider_indices(entries):
    """A plan has millions of entries: int64 copies of them would be felt."""
    blocks = Blocks.of_runs([4, 3, 1], 4)
    counts = torch.tensor([[[len(entries)] + [0] * (blocks.n - 1)]], dtype=torch.int32)
    plan = BlockPlan(
        q_blocks=blocks,
        k_blocks=blocks,
        indices=torch.tensor(entries, dtype=torch.int32),
        offsets=torch.zeros_like(counts),
        full=counts,
        partial=torch.zeros_like(counts),
    )
    with Widths() as widths:
        starts, lengths = plan.spans
    assert widths.seen == {torch.int32}
    assert starts.tolist() == [[0, 4, 7][j] for j in entries]
    assert lengths.tolist() == [[4, 3, 1][j] for j in entries]
    assert [x.shape for x in plan.to("meta").spans] == [starts.shape, lengths.shape]


def test_to_moves_every_tensor_and_str_is_one_line():
    blocks = Blocks.uniform(5, 2)
    plan = BlockPlan.from_mask(
        torch.ones(1, 1, 3, 3, dtype=torch.bool),
        blocks,
        blocks,
        full=torch.zeros(1, 1, 3, 3, dtype=torch.bool),
        box=Boxes.random((2, 2), 1, 5, 5, seed=0).packed(),
        order=Permutation(torch.arange(5)),
        tail="zeroth",
    )
    moved = plan.to("meta")
    assert moved.device.type == "meta"
    assert moved.box.above.device.type == moved.order.index.device.type == "meta"
    assert moved.q_blocks.starts.device.type == moved.k_blocks.starts.device.type == "meta"
    assert (moved.tail, moved.box.guard) == ("zeroth", plan.box.guard)
    assert "\n" not in str(plan)
    assert "tail zeroth, box, order" in str(plan)
