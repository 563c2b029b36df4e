"""Which query blocks each program of a persistent launch takes."""

from __future__ import annotations

import heapq
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_sparse.plan import BlockPlan, Blocks
from dit_sparse.predicate import DiskPredicate
from scripts.launches import cases

dealing = pytest.importorskip("dit_sparse.kernels.dealt")
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")


def plan_of(blocks: int, heads: int, picture: range, read: int, keys: int = 12) -> BlockPlan:
    """Blocks around the picture read everything, the others some."""
    visited = torch.ones(1, heads, blocks, keys, dtype=torch.bool)
    visited[:, :, picture.start : picture.stop, read:] = False
    q_blocks = replace(Blocks.uniform(blocks * 16, 16), picture=picture)
    plan = BlockPlan.from_mask(visited, q_blocks, Blocks.uniform(keys * 16, 16))
    return replace(plan, uneven=False, lasting=False)


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


@INTERPRETED
@pytest.mark.parametrize(
    "kind", ["even", "uneven", "text", "masked", "disk", "masked, of one call", "many programs"]
)
def test_plans_of_many_calls_are_dealt_by_length_where_lists_may_differ(monkeypatch, kind: str):
    one_call, many = "one call" in kind, kind == "many programs"
    plan = replace(plan_of(6, 60, range(kind == "text", 6), 3), lasting=not one_call)
    partial = torch.ones_like(plan.partial).cumsum(-1, dtype=torch.int32) % 3
    if kind not in ("even", "uneven", "text"):
        zero = torch.zeros(1, 192, dtype=torch.int32)
        disk = DiskPredicate(zero, zero, zero[0])
        plan = replace(
            plan, words=None if kind == "disk" else plan.indices[:, None], partial=partial
        )
        plan = replace(plan, disk=disk if kind == "disk" else None, full=plan.full - partial)
    plan = replace(plan, uneven=kind == "uneven")
    asked = []
    monkeypatch.setattr(dealing, "_by_length", lambda *given: asked.append(given) or "a deal")
    deal = dealing.dealt(plan, 1, 60, 300 if many else 5)
    assert len(asked) == (kind in ("uneven", "text", "masked", "disk"))
    assert (deal is None) == (kind in ("even", "masked, of one call"))
    if kind == "disk":
        monkeypatch.undo()
        monkeypatch.setattr(dealing, "queue_of", lambda *_: torch.arange(360, dtype=torch.int32))
        without = replace(plan, disk=None, partial=0 * partial)
        found = taken(dealing._by_length(plan, 1, 60, 5))
        assert found == taken(dealing._by_length(without, 1, 60, 5)), "another launch has the rest"
        assert found != taken(dealing._by_length(replace(plan, disk=None), 1, 60, 5))


@pytest.mark.parametrize("text", [0, 1])
def test_a_queue_is_dealt_in_turns_that_change_direction(monkeypatch, text: int):
    plan = replace(plan_of(6, 2, range(text, 6), 6), uneven=True, lasting=False)
    queue = torch.arange(12, dtype=torch.int32).flip(0)
    monkeypatch.setattr(dealing, "queue_of", lambda *_: queue)
    deal = dealing.dealt(plan, 1, 2, 4)
    if text:  # the queue begins with two of text, each of which is worth two
        assert taken(deal) == [[11, 5], [10, 4], [9, 6, 3, 0], [8, 7, 2, 1]]
    else:
        assert taken(deal) == [[11, 4, 3], [10, 5, 2], [9, 6, 1], [8, 7, 0]]
    assert sorted([tile for one in taken(deal) for tile in one]) == list(range(12))
    assert dealing.dealt(plan, 1, 2, 4) is deal


class OneByOne:
    """The launch's deal by hand: each tile to who has least, and no more than so many turns."""

    def __init__(self, worths: list[int], programs: int, most: int) -> None:
        self.found: list[list[int]] = [[] for _ in range(programs)]
        self.open = [(0, program) for program in range(programs)]
        self.loads = [0] * programs
        for place, worth in enumerate(worths):
            load, program = heapq.heappop(self.open)
            self.found[program].append(place)
            self.loads[program] = load + worth
            if len(self.found[program]) < most:
                heapq.heappush(self.open, (load + worth, program))


def by_length(
    full: Tensor, partial: Tensor, queue: Tensor, batch: int, heads: int, programs: int
) -> tuple[dealing.Deal, OneByOne]:
    """What the launch deals, and what one by one would be; asserts that they are the same."""
    plan = BlockPlan(
        q_blocks=Blocks.uniform(full.shape[2] * 16, 16, full.device),
        k_blocks=Blocks.uniform(64, 16, full.device),
        indices=full.new_zeros(1),
        offsets=torch.zeros_like(full),
        full=full,
        partial=partial,
        uneven=True,
        lasting=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dealing, "queue_of", lambda *_: queue)
        deal = dealing.dealt(plan, batch, heads, programs)
        assert dealing.dealt(plan, batch, heads, programs) is deal
    count = plan.count.expand(batch, heads, -1).flatten()[queue.long()]
    most = dealing._most_turns(len(queue), programs)
    expected = OneByOne((count + dealing.START).tolist(), programs, most)
    tiles = queue.tolist()
    assert taken(deal) == [[tiles[place] for place in one] for one in expected.found]
    assert sorted([tile for one in taken(deal) for tile in one]) == list(range(len(tiles)))
    assert all(expected.found)
    assert 0 <= int(deal.tiles.min()) <= int(deal.tiles.max()) < len(tiles)
    return deal, expected


@INTERPRETED
@given(
    programs=st.integers(1, 9),
    entries=st.lists(st.integers(0, 40), min_size=1, max_size=40),
    batch=st.integers(1, 2),
    shared=st.booleans(),
    ordered=st.booleans(),
)
@settings(max_examples=60)
def test_a_launch_deals_to_who_has_least(programs, entries, batch, shared, ordered):
    heads, n = 3, len(entries)
    full = torch.tensor(entries, dtype=torch.int32).view(1, 1, n)
    if not shared:
        full = torch.cat([full, full.flip(-1), full // 3], 1)
    partial = full // 2
    every = (full + partial).expand(batch, heads, -1).flatten()
    queue = every.argsort(descending=True, stable=True).int()
    if not ordered:  # as in a bucket, where neighbours stay beside each other
        queue = torch.arange(len(every), dtype=torch.int32)
    programs = min(programs, len(every))
    deal, expected = by_length(full, partial, queue, batch, heads, programs)
    longest = int(every.max()) + dealing.START
    if len(expected.open) == programs:  # none was held back
        assert max(expected.loads) - min(expected.loads) <= longest
        mean = (int(every.sum()) + len(every) * dealing.START) / programs
        assert max(expected.loads) <= mean + longest
    assert deal.tiles.shape[1] == programs


@INTERPRETED
@pytest.mark.parametrize(
    ("entries", "programs"),
    [
        ([500] + [0] * 299, 2),  # the other one would take 251
        ([500] + [0] * 299, 5),
        ([2000] * 8 + [0] * 300, 9),  # the last one would take them all, and may not
        ([7] * 120, 8),
        ([7] * 13, 8),  # not two for each
        ([9, 1, 1, 1, 1], 5),
        ([0] * 9, 1),
        ([3, 2], 2),
    ],
)
def test_lists_at_their_worst(entries: list[int], programs: int):
    full = torch.tensor(entries, dtype=torch.int32).view(1, 1, -1)
    queue = torch.arange(len(entries), dtype=torch.int32)
    deal, expected = by_length(full, torch.zeros_like(full), queue, 1, 1, programs)
    most = dealing._most_turns(len(entries), programs)
    assert int(deal.turns.max()) <= most
    assert (int(deal.turns.max()) == most) == (len(expected.open) < programs)


@INTERPRETED
def test_as_many_programs_as_a_gpu_has():
    source = torch.Generator().manual_seed(0)
    full = (torch.rand(1, 4, 300, generator=source) ** 4 * 90).int()
    queue = full.flatten().argsort(descending=True, stable=True).int()
    first, _ = by_length(full, full // 4, queue, 1, 4, 132)
    again, _ = by_length(full, full // 4, queue, 1, 4, 132)
    assert torch.equal(first.tiles, again.tiles)
    assert torch.equal(first.turns, again.turns)


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [1, 2, 7, 33, 64, 132, 256])
def test_a_gpu_deals_as_one_by_one(programs: int):
    source = torch.Generator().manual_seed(programs)
    for share in (0.02, 1.0):
        some = torch.rand(1, 4, 300, generator=source) < share
        full = ((torch.rand(1, 4, 300, generator=source) ** 4 * 900).int() * some).cuda()
        queue = (full + full // 4).flatten().argsort(descending=True, stable=True).int()
        by_length(full, full // 4, queue, 1, 4, programs)


def test_more_programs_than_the_launch_tells_apart_take_turns(monkeypatch):
    plan, queue = plan_of(100, 3, range(100), 6), torch.arange(300, dtype=torch.int32)
    plan = replace(plan, uneven=True, lasting=True)
    monkeypatch.setattr(dealing, "queue_of", lambda *_: queue)
    deal = dealing.dealt(plan, 1, 3, 257)
    assert sorted([tile for one in taken(deal) for tile in one]) == list(range(300))


@INTERPRETED
def test_plans_with_heads_of_all_lengths_are_dealt_evenly():
    """Of 864 query blocks each program has 6.5."""
    for case in cases.windows_of_heads():
        if "1x64x64" not in case.name:
            continue
        assert case.plan.lasting
        deal = dealing.dealt(case.plan, 1, case.heads, 132)
        count = case.plan.count.expand(1, case.heads, -1).flatten() + dealing.START
        loads = torch.tensor([int(count[one].sum()) for one in taken(deal)])
        assert int(loads.sum()) == int(count.sum())
        assert float(loads.max() / loads.float().mean()) < 1.04


def test_room_in_lists_counts_as_entries():
    """Which are fewer then: text is worth too little."""
    plan = plan_of(6, 2, range(1, 6), 3)
    assert dealing._worth(plan, 5) == 4
    roomy = replace(plan, indices=torch.cat([plan.indices, plan.indices.new_zeros(30)]))
    assert dealing._worth(roomy, 5) == 2
