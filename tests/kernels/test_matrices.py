"""Which tensors specialised loads take."""

import pytest
import torch

from dit_sparse.plan import BlockPlan, Blocks

hopper = pytest.importorskip("dit_sparse.kernels.hopper")


def plan_of(tokens: int, entries: int) -> BlockPlan:
    blocks = Blocks.uniform(tokens, 128, "cpu")
    visited = torch.arange(blocks.n) < entries
    return BlockPlan.from_mask(visited.expand(1, 1, blocks.n, blocks.n), blocks, blocks)


def test_ends_of_short_blocks_are_read_only_where_nothing_else_stands():
    """Behind the last key of a slice another tensor's values may be NaN, which no weight hides."""
    whole = torch.zeros(1, 2, 400, 64, dtype=torch.bfloat16)
    own, sliced = whole[:, :, :300].contiguous(), whole[:, :, :300]
    short = plan_of(300, 3)
    assert hopper.matrices_of(own, own, own, short) is not None
    assert hopper.matrices_of(sliced, own, own, short) is not None  # rows of q reach no other row
    assert hopper.matrices_of(own, sliced, own, short) is None
    assert hopper.matrices_of(own, own, sliced, short) is None
    even = whole[:, :, :256]
    assert hopper.matrices_of(even, even, even, plan_of(256, 2)) is not None
    transposed = own.transpose(2, 3)
    assert hopper.matrices_of(own, transposed, own, short) is None
