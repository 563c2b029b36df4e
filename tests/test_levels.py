"""Plans from level matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse import levels
from dit_sparse.levels import plan_of_levels
from dit_sparse.plan import Blocks
from dit_sparse.plan_check import check

CHOICES = torch.tensor([0, 1, 2, 8], dtype=torch.uint8)


@given(st.integers(0, 10_000), st.integers(1, 12), st.sampled_from([None, "longest", "all", 99]))
def test_lists_say_what_the_matrix_says(seed: int, n_k: int, room: int | str | None):
    generator = torch.Generator().manual_seed(seed)
    level = CHOICES[torch.randint(4, (2, 3, 4, n_k), generator=generator)]
    if room == "longest":
        room = int((level > 0).sum(-1).max())
    elif room == "all":
        room = n_k
    queries, keys = Blocks.uniform(8, 2), Blocks.uniform(4 * n_k - 1, 4)
    plan = check(plan_of_levels(level, queries, keys, factors=(2, 8), room=room, tail="zeroth"))
    assert torch.equal(plan.listed("full"), level == 1)
    assert torch.equal(plan.listed("pooled"), level > 1)
    assert torch.equal(plan.visited, level > 0)
    assert torch.equal(plan.to("cpu").visited, level > 0)
    assert torch.equal(plan.pools.counts[..., 0], (level == 2).sum(-1))
    assert torch.equal(plan.pools.counts[..., 1], (level == 8).sum(-1))


def test_rows_are_sorted_in_parts(monkeypatch: pytest.MonkeyPatch):
    level = CHOICES[torch.randint(4, (2, 3, 4, 9))]
    queries, keys = Blocks.uniform(8, 2), Blocks.uniform(18, 2)
    for room in (None, 9):
        whole = plan_of_levels(level, queries, keys, factors=(2, 8), room=room)
        with monkeypatch.context() as patch:
            patch.setattr(levels, "_SORTED", 20)
            parts = plan_of_levels(level, queries, keys, factors=(2, 8), room=room)
        assert torch.equal(parts.indices, whole.indices)


def test_with_room_no_value_is_looked_at():
    """What a CUDA device would be waited for fails without values."""
    level = torch.zeros(1, 2, 4, 9, dtype=torch.uint8, device="meta")
    queries, keys = Blocks.uniform(8, 2, "meta"), Blocks.uniform(18, 2, "meta")
    plan = plan_of_levels(level, queries, keys, factors=(2,), room=5, tail="first")
    assert plan.indices.shape == (2 * 4 * 5,)
    assert plan.visited.shape == level.shape
    with pytest.raises(NotImplementedError):
        plan_of_levels(level, queries, keys, factors=(2,))


@pytest.mark.parametrize("shape", [(1, 1, 4, 8), (1, 4, 9)])
def test_another_shape(shape: tuple[int, ...]):
    queries, keys = Blocks.uniform(8, 2), Blocks.uniform(18, 2)
    with pytest.raises(ValueError, match=r"levels of dtype torch.uint8 .* 4, 9\], got"):
        plan_of_levels(torch.zeros(shape, dtype=torch.uint8), queries, keys)
