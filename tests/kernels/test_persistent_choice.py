"""How many query blocks a program of the Hopper kernel takes."""

from dataclasses import replace

import pytest
import torch

from dit_sparse.plan import BlockPlan, Blocks

hopper_persistent = pytest.importorskip("dit_sparse.kernels.hopper_persistent")

MULTIPROCESSORS = 132


@pytest.fixture(autouse=True)
def _h200(monkeypatch: pytest.MonkeyPatch) -> None:
    def slots(device: torch.device, dim: int, masked: bool) -> int:
        return MULTIPROCESSORS * (2 if dim <= 64 and not masked else 1)

    monkeypatch.setattr(hopper_persistent, "_slots", slots)


def plan_of(tokens: int, entries: int) -> BlockPlan:
    blocks = Blocks.uniform(tokens, 128, "cpu")
    visited = torch.arange(blocks.n) < entries
    return BlockPlan.from_mask(visited.expand(1, 1, blocks.n, blocks.n), blocks, blocks)


@pytest.mark.parametrize(
    ("tokens", "heads", "dim", "entries", "each"),
    [
        (16_896, 24, 64, 26, 4),
        (32_768, 12, 64, 51, 4),
        (118_784, 24, 64, 93, 2),  # keys and values of a head fill half of L2, in many rounds
        (16_896, 24, 128, 26, 8),
        (16_896, 24, 128, 60, 1),  # long lists
        (65_536, 24, 128, 20, 1),  # a large head
        (4_608, 24, 64, 7, 1),  # few tiles
        (2_048, 4, 128, 3, 1),
    ],
)
def test_short_lists_of_small_heads_share_programs(tokens, heads, dim, entries, each):
    q = torch.empty(1, heads, tokens, dim, dtype=torch.bfloat16, device="meta")
    assert hopper_persistent.blocks_each(q, plan_of(tokens, entries), masked=False) == each


def test_ends_of_short_blocks_are_read_only_where_nothing_else_stands():
    """Behind the last key of a slice another tensor's values may be NaN, which no weight hides."""
    hopper = pytest.importorskip("dit_sparse.kernels.hopper")
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


def test_lists_of_different_lengths_share_programs_in_pairs():
    """And with a mask not at all where a program has a multiprocessor: it would leave exponentials
    bare."""
    q = torch.empty(1, 24, 16_896, 128, dtype=torch.bfloat16, device="meta")
    plan = plan_of(16_896, 26)
    uneven = replace(plan, uneven=True)
    assert hopper_persistent.blocks_each(q, plan, masked=True) == 8
    assert hopper_persistent.blocks_each(q, uneven, masked=False) == 2
    assert hopper_persistent.blocks_each(q, uneven, masked=True) == 1
    assert hopper_persistent.blocks_each(q[..., :64], uneven, masked=True) == 2
    assert hopper_persistent.blocks_each(q, plan, masked=False, places=2) != 1
