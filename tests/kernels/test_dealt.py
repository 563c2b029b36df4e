"""Which query blocks each program of a persistent launch takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.plan import BlockPlan, Blocks

dealing = pytest.importorskip("dit_sparse.kernels.dealt")


def plan_of(blocks: int, heads: int, picture: range, read: int, keys: int = 12) -> BlockPlan:
    """Blocks around the picture read everything, the others some."""
    visited = torch.ones(1, heads, blocks, keys, dtype=torch.bool)
    visited[:, :, picture.start : picture.stop, read:] = False
    q_blocks = replace(Blocks.uniform(blocks * 16, 16), picture=picture)
    plan = BlockPlan.from_mask(visited, q_blocks, Blocks.uniform(keys * 16, 16))
    return replace(plan, uneven=False)


def taken(deal: dealing.Deal) -> list[list[int]]:
    """By each program; asserts that what it reads ahead is there."""
    programs = len(deal.turns)
    assert deal.tiles.dtype == deal.turns.dtype == torch.int32
    assert deal.tiles.is_contiguous()
    assert len(deal.tiles) >= int(deal.turns.max()) + dealing.AHEAD
    return [deal.tiles[: int(deal.turns[n]), n].tolist() for n in range(programs)]


@given(
    programs=st.integers(1, 9),
    inner=st.integers(1, 12),
    text=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    heads=st.integers(1, 6),
    read=st.integers(0, 12),
    batch=st.integers(1, 2),
)
def test_tiles_are_dealt_once_each_and_text_evenly(programs, inner, text, heads, read, batch):
    before, behind = text
    blocks = before + inner + behind
    picture = range(before, before + inner)
    tiles = batch * heads * blocks
    programs = min(programs, tiles)
    deal = dealing.dealt(plan_of(blocks, heads, picture, read), batch, heads, programs)
    if before + behind == 0:
        assert deal is None
        return
    found = taken(deal)
    assert sorted([tile for one in found for tile in one]) == list(range(tiles))
    assert all(found)
    assert int(deal.tiles.min()) >= 0
    assert int(deal.tiles.max()) < tiles
    worth = round(12 / max(read, 1))
    times = [sum(1 if tile % blocks in picture else worth for tile in one) for one in found]
    spread = max(times) - min(times)
    few = batch * heads * inner < worth * programs  # of the picture, to even out with
    assert spread <= worth if few else spread <= 1
    for one in found:  # text first
        assert [tile % blocks in picture for tile in one] == sorted(
            tile % blocks in picture for tile in one
        )


def test_a_plan_without_text_and_with_even_lists_needs_no_deal():
    plan = plan_of(6, 2, range(6), 3)
    assert dealing.dealt(plan, 1, 2, 4) is None
    assert dealing.dealt(replace(plan, q_blocks=Blocks.uniform(96, 16)), 1, 2, 4) is None


@pytest.mark.parametrize("text", [0, 1])
def test_a_queue_is_dealt_in_turns_that_change_direction(monkeypatch, text: int):
    plan = replace(plan_of(6, 2, range(text, 6), 6), uneven=True, counted=False)
    queue = torch.arange(12, dtype=torch.int32).flip(0)
    monkeypatch.setattr(dealing, "longest_first", lambda *_: queue)
    deal = dealing.dealt(plan, 1, 2, 4)
    if text:  # the queue begins with two of text, each of which is worth two
        assert taken(deal) == [[11, 5], [10, 4], [9, 6, 3, 0], [8, 7, 2, 1]]
    else:
        assert taken(deal) == [[11, 4, 3], [10, 5, 2], [9, 6, 1], [8, 7, 0]]
    assert sorted([tile for one in taken(deal) for tile in one]) == list(range(12))
    assert dealing.dealt(plan, 1, 2, 4) is deal


@given(
    programs=st.integers(1, 9),
    entries=st.lists(st.integers(0, 40), min_size=1, max_size=40),
    batch=st.integers(1, 2),
)
def test_a_queue_whose_lengths_are_known_is_dealt_by_them(programs, entries, batch):
    keys = Blocks.uniform(41 * 16, 16)
    visited = torch.arange(41) < torch.tensor(entries)[:, None]
    plan = BlockPlan.from_mask(visited[None, None], Blocks.uniform(len(entries) * 16, 16), keys)
    assert plan.counted
    plan, tiles = replace(plan, uneven=True), batch * 3 * len(entries)
    queue = torch.tensor(entries * (batch * 3)).argsort(descending=True, stable=True).int()
    programs = min(programs, tiles)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dealing, "longest_first", lambda *_: queue)
        found = taken(dealing.dealt(plan, batch, 3, programs))
    assert sorted([tile for one in found for tile in one]) == list(range(tiles))
    lengths = [[entries[tile % len(entries)] + dealing._START for tile in one] for one in found]
    assert all(one == sorted(one, reverse=True) for one in lengths)
    times = list(map(sum, lengths))
    assert max(times) - min(times) <= max(entries) + dealing._START
    # Whoever got the last one had least before it.
    assert all(time - one[-1] <= min(times) for time, one in zip(times, lengths, strict=True))


def test_room_in_lists_counts_as_entries():
    """Which are fewer then: text is worth too little."""
    plan = plan_of(6, 2, range(1, 6), 3)
    assert dealing._worth(plan, 5) == 4
    roomy = replace(plan, indices=torch.cat([plan.indices, plan.indices.new_zeros(30)]))
    assert dealing._worth(roomy, 5) == 2
