"""How many query blocks a program of the Hopper kernel takes."""

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
        (98_304, 24, 64, 77, 2),  # keys and values of a head fill half of L2
        (16_896, 24, 128, 26, 8),
        (16_896, 24, 128, 60, 1),  # long lists
        (65_536, 24, 128, 20, 1),  # a large head
        (4_608, 24, 64, 7, 1),  # few tiles
        (2_048, 4, 128, 3, 1),
    ],
)
def test_as_was_fastest_where_it_was_measured(tokens, heads, dim, entries, each):
    q = torch.empty(1, heads, tokens, dim, dtype=torch.bfloat16, device="meta")
    assert hopper_persistent.blocks_each(q, plan_of(tokens, entries), masked=False) == each
