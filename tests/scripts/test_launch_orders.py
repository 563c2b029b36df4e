"""The simulator of launches, against counts that can be done by hand."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_sparse.grid import TokenGrid
from dit_sparse.methods.sta import SlidingTileMethod
from dit_sparse.plan import BlockPlan, Blocks

launch_orders = pytest.importorskip("scripts.launch_orders")

from scripts.launches import cases, fit, schedule  # noqa: E402
from scripts.launches.schedule import LIBRARY, Cost, Losses, Way, Work  # noqa: E402

ENTRY = Cost(block=0.0, entry=1.0)
WORK = Work(
    rows=np.array([[1, 1, 2, 6], [1, 1, 6, 6]]),
    inside=np.array([True, True, True, False]),
    key_blocks=6,
    worth=3,
    queued=True,
    lasting=True,
    masked=False,
)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "MULTIPROCESSORS", 3)


def shared(work: Work, way: Way) -> list[list[int]]:
    return [rows.tolist() for rows in work.shares(way)]


def test_the_way_is_that_of_the_library() -> None:
    assert WORK.way == "by length"
    assert replace(WORK, lasting=False).way == "by place"
    even = replace(WORK, queued=False)
    assert even.way == "by length"
    assert replace(even, lasting=False).way == "by place"
    alone = replace(even, inside=np.ones(4, dtype=bool))
    assert alone.way == "in turns"
    assert replace(alone, masked=True).way == "by length"
    assert replace(alone, masked=True, lasting=False).way == "in turns"


def test_queues() -> None:
    assert WORK.queue.tolist() == [6, 6, 6, 2, 1, 1, 1, 1]
    assert replace(WORK, queued=False).queue.tolist() == [6, 6, 1, 1, 2, 1, 1, 6]


@pytest.mark.usefixtures("few")
def test_shares() -> None:
    assert shared(WORK, "in turns") == [[1, 6, 6], [1, 1, 6], [2, 1]]
    even = replace(WORK, queued=False)  # text first, which is worth three others
    assert shared(even, "by place") == [[6, 6], [6, 1], [1, 1, 2, 1]]
    assert shared(WORK, "by place") == [[6, 1], [6, 1], [6, 2, 1, 1]]
    assert shared(WORK, "by length") == [[6, 2], [6, 1, 1], [6, 1, 1]]
    assert shared(even, "by length") == shared(WORK, "by length")
    assert WORK.longest("in turns", ENTRY).tolist() == [1, 6, 6]
    assert WORK.longest("in turns", Cost(9.0, 0.1)).tolist() == [1, 6, 6]


def test_no_more_programs_than_rows() -> None:
    for way in schedule.WAYS:
        assert sorted(chain(*shared(WORK, way))) == [1, 1, 1, 1, 2, 6, 6, 6]
        assert len(shared(WORK, way)) == 8


@pytest.mark.usefixtures("few")
def test_ways_are_those_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who takes what, but for the queue, which takes a launch."""
    dealt = pytest.importorskip("dit_sparse.kernels.dealt")
    method = SlidingTileMethod(window=((1, 1), (9, 9)), tile=(8, 16))
    plan = cases._case("", method, TokenGrid(1, 16, 32), 130, 2).plan
    count = plan.count.expand(1, 2, -1).flatten()
    for uneven in (False, True):
        work = Work.of(replace(plan, uneven=uneven, lasting=False), 2)
        order = np.argsort(schedule.buckets(count.numpy(), 6), kind="stable")
        queue = torch.from_numpy(order).int() if uneven else None
        monkeypatch.setattr(dealt, "queue_of", lambda *_, queue=queue: queue)
        deal = dealt.dealt(replace(plan, uneven=uneven, lasting=False), 1, 2, 3)
        assert work.way == "by place"
        found = [deal.tiles[: int(deal.turns[n]), n].long() for n in range(3)]
        assert shared(work, "by place") == [count[one].tolist() for one in found]


def test_who_has_had_enough_takes_no_more() -> None:
    """As the launch that deals: see `dealt._most_turns`."""
    places = list(schedule._by_length([2000, *[0] * 400], 3))
    assert sorted(chain(*places)) == list(range(401))
    assert [len(one) for one in places] == [1, 200, 200]
    alone = list(schedule._by_length([2000] * 2 + [0] * 400, 3))
    assert [len(one) for one in alone] == [51, 51, 300]


def test_chunks_are_of_text_rows_alone_and_add_up() -> None:
    cut = replace(WORK, rows=np.array([[1, 1, 2, 7], [1, 1, 6, 7]])).chunked(2)
    assert cut.rows.tolist() == [[4, 3, 1, 1, 2], [4, 3, 1, 1, 6]]
    assert cut.inside.tolist() == [False, False, True, True, True]
    assert cut.worth == 2
    assert WORK.chunked(8).worth == 1


@pytest.mark.usefixtures("few")
def test_losses() -> None:
    """24 entries at three places take 8; in turns one has 13."""
    found = Losses.of(WORK, ENTRY)
    assert (found.blocks, found.ideal) == (8, 0.008)
    assert found.ways == {
        "in turns": pytest.approx(13 / 8 - 1),
        "by place": pytest.approx(10 / 8 - 1),
        "by length": pytest.approx(0.0),
    }
    assert found.chunks == pytest.approx(0.0, abs=0.2)


def test_buckets_are_those_of_the_kernel() -> None:
    """A list of 32 is in the bucket of 39, and 31 in the next one."""
    rows = np.array([64, 56, 40, 39, 32, 31, 1, 0])
    assert schedule.buckets(rows, 64).tolist() == [0, 1, 3, 4, 4, 5, 24, 31]
    assert schedule.buckets(np.array([1]), 1000).tolist() == [31]
    longest_first = pytest.importorskip("dit_sparse.kernels.longest_first")
    if torch.cuda.is_available():
        return
    visited = torch.arange(64) < torch.from_numpy(rows)[:, None]
    plan = BlockPlan.from_mask(visited[None, None], Blocks.uniform(8, 1), Blocks.uniform(64, 1))
    found = longest_first.longest_first(replace(plan, uneven=True), 1, 1)
    assert found.tolist() == np.argsort(schedule.buckets(rows, 64), kind="stable").tolist()


def test_work_of_a_plan_with_text() -> None:
    method = SlidingTileMethod(window=((1, 1), (9, 9)), tile=(8, 16))
    grid = TokenGrid(1, 16, 32)
    found = Work.of(cases._case("", method, grid, 130, 2).plan, 2)
    # Two blocks of text, four of the picture.
    assert found.rows[:, ~found.inside].tolist() == [[6, 6], [6, 6]]
    assert found.rows[:, found.inside].tolist() == [[3] * 4, [6] * 4]
    assert (found.key_blocks, found.queued, found.lasting) == (6, False, True)
    alike = cases._case("", SlidingTileMethod(window=(1, 1), tile=(8, 16)), grid, 0, 5, 64).plan
    assert Work.of(alike, 5).rows.tolist() == [[1] * 4] * 5
    assert Work.of(alike, 5).way == "in turns"


def test_made_up_queries_are_the_same_every_time_and_make_rows_differ() -> None:
    grid = TokenGrid(1, 16, 32)
    for kind in ("random", "clustered"):
        first, again = (cases.made_up(grid, 10, 2, kind) for _ in range(2))
        assert all(map(torch.equal, first, again))
        assert first[0].shape == (1, 2, 522, 32)


def rows(block: float, entry: float) -> list[dict]:
    """Measurements of a GPU whose times are what a fit takes them for."""
    made = []
    for tokens, heads, density in ((16_384, 24, 1.0), (32_768, 24, 0.1), (32_768, 2, 0.2)):
        row = {"tokens": tokens, "heads": heads, "head_dim": 128, "density": density}
        row |= {"grid": None, "variant": "triton"}
        work = Work.of(fit._plan(row), heads)
        time = Cost(block, entry).of(work.longest(work.way, LIBRARY))
        time += fit.PASS * tokens * heads * 128
        made.append(row | {"ms": time / 1000})
    return [*made, made[0] | {"variant": "cudnn", "ms": 1.0}, made[0] | {"head_dim": 64}]


def test_a_fit_finds_what_made_the_times(tmp_path: Path) -> None:
    path = tmp_path / "kernels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(5.0, 1.5)))
    found = fit.fit(path, 128)
    assert found.cost.block == pytest.approx(5.0)
    assert found.cost.entry == pytest.approx(1.5)
    assert (found.rows, found.worst < 1e-6) == (3, True)


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["launch_orders.py", "--only", "sta mixed, 1x64x64"])
    launch_orders.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("Head dim 128: ")
    assert len(lines) == 5
    turns, place, length = (float(cell.split()[0]) for cell in lines[-1].split(" | ")[3:6])
    assert min(turns, place) > 20 > 5 > length
    assert lines[-1].split(" | ")[5].endswith(" *")
    assert lines[-1].count(" * |") == 1
