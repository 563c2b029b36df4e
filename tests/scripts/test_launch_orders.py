"""The simulator of launches, against counts that can be done by hand."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_sparse.grid import TokenGrid
from dit_sparse.methods.sta import SlidingTileMethod
from dit_sparse.methods.window import WindowMethod
from dit_sparse.plan import BlockPlan, Blocks

launch_orders = pytest.importorskip("scripts.launch_orders")

from scripts.launches import cases, fit, schedule  # noqa: E402
from scripts.launches.schedule import Cost, Losses, Work  # noqa: E402

ENTRY = Cost(program=0.0, entry=1.0)
WORK = Work(
    outer=np.array([[6], [6]]),
    inner=np.array([[1, 1, 2], [1, 1, 6]]),
    key_blocks=6,
    each=1,
    each_queued=1,
    places=3,
    queued=True,
)


def test_makespan_gives_the_next_program_to_the_first_free_place() -> None:
    assert schedule.makespan([3, 1, 1, 1, 4], 2, ENTRY) == 7
    assert schedule.makespan([4, 3, 1, 1, 1], 2, ENTRY) == 5
    assert schedule.makespan([3, 1], 2, Cost(2.0, 0.5)) == 3.5
    assert schedule.makespan([], 2, ENTRY) == 0
    assert schedule.ideal([3, 1, 1, 1, 4], 2, Cost(2.0, 0.5)) == 7.5


def test_orders_of_programs() -> None:
    assert WORK.programs == [6, 6, 1, 1, 2, 1, 1, 6]
    assert WORK.queue == WORK.longest_first == [6, 6, 6, 2, 1, 1, 1, 1]
    pairs = replace(WORK, each=2)
    assert pairs.programs == [6, 6, 2, 3, 7]
    assert pairs.longest_first == WORK.longest_first
    assert replace(WORK, each_queued=2).longest_first == [6, 6, 8, 2, 2]


def test_chunks_are_of_text_rows_alone_and_add_up() -> None:
    work = replace(WORK, outer=np.array([[7], [7]]))
    assert work.chunked([7, 7, 1, 6], 2) == [4, 3, 4, 3, 1, 6]
    assert work.chunked([7, 3], 4) == [2, 2, 2, 1, 3]


def test_losses() -> None:
    """24 entries at three places take 8; the long one that comes last runs on to 12."""
    found = Losses.of(WORK, ENTRY)
    assert (found.programs, found.ideal) == (8, 0.008)
    assert found.plain == pytest.approx(12 / 8 - 1)
    assert found.longest == pytest.approx(0.0)
    assert found.both >= 0.0


def test_loss_of_a_deal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a row is as much as two entries: 8, 8 and 8; 4, 3 and 3; 3 and 3 are 40, of which a
    program has 14 where 13 1/3 are the mean."""
    monkeypatch.setattr(schedule, "MULTIPROCESSORS", 3)
    monkeypatch.setattr(schedule, "START", 2)
    assert Losses.of(WORK, ENTRY).dealt == pytest.approx(14 / (40 / 3) - 1)


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
    assert found.outer.tolist() == [[6, 6], [6, 6]]  # two blocks of text, four of the picture
    assert found.inner.tolist() == [[3] * 4, [6] * 4]
    assert (found.places, found.key_blocks, found.queued) == (132, 6, False)
    shared = cases._case("", SlidingTileMethod(window=(1, 1), tile=(8, 16)), grid, 0, 5, 64).plan
    assert Work.of(shared, 5, 64).inner.tolist() == [[1] * 4] * 5
    assert Work.of(shared, 5, 64).places == 264  # two to a multiprocessor, but for masks
    masked = cases._case("", WindowMethod(window=(5, 5)), grid, 0, 5, 64).plan
    assert Work.of(masked, 5, 64).places == 132


def test_made_up_queries_are_the_same_every_time_and_make_rows_differ() -> None:
    grid = TokenGrid(1, 16, 32)
    for kind in ("random", "clustered"):
        first, again = (cases.made_up(grid, 10, 2, kind) for _ in range(2))
        assert all(map(torch.equal, first, again))
        assert first[0].shape == (1, 2, 522, 32)


def rows(program: float, entry: float, token: float) -> list[dict]:
    """Measurements of a GPU whose times are what a fit takes them for."""
    made = []
    for tokens, heads, density in ((16_384, 24, 1.0), (32_768, 24, 0.1), (32_768, 2, 0.2)):
        row = {"tokens": tokens, "heads": heads, "head_dim": 128, "density": density}
        row |= {"grid": None, "variant": "triton"}
        work = Work.of(fit._plan(row), heads)
        time = program * len(work.programs) + entry * sum(work.programs) + token * heads * tokens
        made.append(row | {"ms": time / work.places / 1000})
    return [*made, made[0] | {"variant": "cudnn", "ms": 1.0}, made[0] | {"head_dim": 64}]


def test_a_fit_finds_what_made_the_times(tmp_path: Path) -> None:
    path = tmp_path / "kernels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(5.0, 1.5, 0.03)))
    found = fit.fit(path, 128)
    assert found.cost.program == pytest.approx(5.0)
    assert found.cost.entry == pytest.approx(1.5)
    assert found.token == pytest.approx(0.03)
    assert (found.rows, found.worst < 1e-6) == (3, True)


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["launch_orders.py", "--only", "sta mixed, 1x64x64"])
    launch_orders.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("Head dim 128: ")
    assert len(lines) == 5
    plain, longest, dealt = (float(cell.split()[0]) for cell in lines[-1].split(" | ")[3:6])
    assert plain > 20 > 15 > longest > dealt
    assert lines[-1].count(" * |") == 2
