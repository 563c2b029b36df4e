"""The search of windows per head, and the table that keeps what it found."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dit_sparse import methods
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.method import CallContext
from dit_sparse.methods.sta import SlidingTileMethod
from dit_sparse.plan_check import check_for
from dit_sparse.window_search import Sample, choose, search
from dit_sparse.window_table import WindowTable, load_table, save_table

GRID = TokenGrid(4, 8, 8)
LAYOUT = TokenLayout.of(GRID, 0, 3)
TILE = (1, 4, 4)
FRAME, TIME, ALL = (1, 3, 3), (4, 1, 1), (4, 3, 3)
WINDOWS = ((FRAME, TIME), (ALL, FRAME))
TABLE = WindowTable(GRID, TILE, (WINDOWS,), 0.4, 1e-3)


def samples(count: int = 1, strength: float = 8.0) -> list[Sample]:
    """Two layers of heads that look at their own frame, and at their own place in all frames."""
    at = GRID.coordinates().double()
    frame = torch.nn.functional.one_hot(at[:, 0].long(), 4).double()
    place = torch.nn.functional.one_hot((at[:, 1] // 4 * 2 + at[:, 2] // 4).long(), 4).double()
    found = []
    for n, layer in itertools.product(range(count), range(2)):
        heads = [frame, place] if layer == 0 else [place, frame]
        noise = torch.Generator().manual_seed(10 * n + layer)
        key = torch.zeros(1, 2, LAYOUT.length, 8, dtype=torch.float64)
        for head, feature in enumerate(heads):
            key[0, head, : GRID.length, :4] = strength * feature
        value = torch.randn(key.shape, generator=noise, dtype=torch.float64)
        found.append(Sample(layer, *(x.float() for x in (key, key, value))))
    return found


class TestSearch:
    def test_heads_get_the_window_that_they_look_at(self):
        table = search(samples(2), LAYOUT, [ALL, FRAME, TIME], tile=TILE, budget=0.45)
        assert table.windows == (((FRAME, TIME), (TIME, FRAME)),)
        assert table.error < 1e-6
        assert table.density < 0.45

    def test_without_a_need_to_save_the_exact_window_is_taken(self):
        loose = samples(strength=2.0)
        table = search(loose, LAYOUT, [FRAME, TIME, ALL], tile=TILE, budget=1.0)
        assert set(itertools.chain(*table.windows[0])) == {ALL}

    def test_costs_may_be_measured(self):
        """If reading one frame takes longest, it is what a small budget gives up."""
        table = search(
            samples(), LAYOUT, [ALL, FRAME, TIME], tile=TILE, budget=1.0, costs=[9.0, 5.0, 1.0]
        )
        assert table.windows == (((TIME, TIME), (TIME, TIME)),)
        assert table.error > 1e-3

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"budget": 0.01}, r"budget of at least 0\.\d+, the cheapest candidate, got 0\.01"),
            ({"budget": float("nan")}, "got nan"),
            ({"costs": [1.0]}, "a cost for each of 2 candidates, got 1"),
            ({"candidates": []}, "Expected candidates"),
            ({"samples": []}, r"samples of layers 0, 1, 2 and so on, got layers \[\]"),
            ({"samples": samples()[1:]}, r"got layers \[1\]"),
        ],
    )
    def test_refuses(self, changes: dict, sentence: str):
        given_ = {"samples": samples(), "candidates": [FRAME, TIME], "budget": 1.0} | changes
        with pytest.raises(ValueError, match=sentence):
            search(
                given_["samples"],
                LAYOUT,
                given_["candidates"],
                tile=TILE,
                budget=given_["budget"],
                costs=given_.get("costs"),
            )

    def test_segments_have_windows_of_their_own(self):
        """Layers change roles in the second segment, and a third has no samples."""
        late = [s._replace(layer=1 - s.layer, segment=1) for s in samples()]
        table = search(
            samples() + late, LAYOUT, [FRAME, TIME], tile=TILE, budget=1.0, segments=(0, 1, 1, 2)
        )
        early = ((FRAME, TIME), (TIME, FRAME))
        assert table.windows == (early, early[::-1], ())
        assert table.segments == (0, 1, 1, 2)

    def test_segments_count_with_their_steps(self):
        """The second needs more, and what it reads is read in three of four steps."""
        both = samples() + [s._replace(segment=1, v=10 * s.v) for s in samples()]
        costs = [4.0, 1.0]
        table = search(
            *(both, LAYOUT, [ALL, (1, 1, 1)]),
            tile=TILE,
            budget=1.75,
            costs=costs,
            segments=(0, 1, 1, 1),
        )
        spent = [
            sum(costs[w != ALL] for heads in layers for w in heads) / 4 for layers in table.windows
        ]
        assert (spent[0] + 3 * spent[1]) / 4 <= 1.75
        assert table.provenance["cost"] == pytest.approx((spent[0] + 3 * spent[1]) / 4)


class TestChoose:
    @given(st.integers(0, 10_000), st.floats(0.0, 1.0))
    def test_no_choice_of_this_cost_has_less_error(self, seed: int, share: float):
        generator = torch.Generator().manual_seed(seed)
        errors = torch.rand(2, 2, 3, generator=generator, dtype=torch.float64)
        costs = torch.rand(3, generator=generator, dtype=torch.float64) + 0.1
        budget = float(costs.min() + share * (costs.max() - costs.min()))
        chosen = choose(errors, costs, budget)

        def totals(picked: Tensor) -> tuple[float, float]:
            error = errors.view(4, 3).gather(1, picked.view(4, 1)).mean()
            return float(error), float(costs[picked].mean())

        error, cost = totals(chosen)
        assert cost <= budget * (1 + 1e-9)
        for other in itertools.product(range(3), repeat=4):
            other_error, other_cost = totals(torch.tensor(other))
            assert other_cost > cost + 1e-12 or other_error >= error - 1e-12

    def test_of_equal_errors_the_cheaper_is_taken(self):
        assert choose(torch.zeros(1, 3), torch.tensor([3.0, 1.0, 2.0]), 5.0).tolist() == [1]

    def test_refuses_what_is_not_finite(self):
        with pytest.raises(ValueError, match="finite errors"):
            choose(torch.tensor([[float("nan"), 1.0]]), torch.tensor([1.0, 2.0]), 5.0)


class TestTable:
    def test_a_file_and_back(self, tmp_path: Path):
        path = save_table(TABLE, tmp_path / "windows.json")
        assert load_table(path) == TABLE
        assert "\n" not in str(TABLE)

    @pytest.mark.parametrize(
        "damage",
        [
            {"version": 1},
            {"format": "other"},
            {"windows": []},
            {"windows": [[[[3, 3]]]]},
            {"windows": [[[[3, 3, 0]]]]},
            {"windows": [[[[3, 3, 1.5]]]]},
            {"windows": [[[[3, 3, 1]]], [[[3, 3, 1]]]]},
            {"segments": [1]},
            {"model": {"kind": "Other"}},
            {"grid": "4by8"},
            {"tile": None},
            {"error": "small"},
        ],
    )
    def test_damaged_files(self, tmp_path: Path, damage: dict):
        path = save_table(TABLE, tmp_path / "windows.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | damage))
        with pytest.raises(ValueError, match=r"Expected a table of windows.*got: .*save_table\."):
            load_table(path)

    @pytest.mark.parametrize("text", ["", "[]", "{}", "plan"])
    def test_other_files(self, tmp_path: Path, text: str):
        (tmp_path / "other").write_text(text)
        with pytest.raises(ValueError, match="Expected a table of windows"):
            SlidingTileMethod(table=str(tmp_path / "other"))

    def test_no_file(self, tmp_path: Path):
        with pytest.raises(ValueError, match=r"Expected to read a table of windows in .*No such"):
            SlidingTileMethod(table=str(tmp_path / "none"))

    def test_the_method_runs_it(self, tmp_path: Path):
        path = str(save_table(TABLE, tmp_path / "windows.json"))
        method = methods.create("sta", {"table": path})
        assert method.scope == "layer"
        assert SlidingTileMethod().scope == "layout"
        q = torch.zeros(1, 2, LAYOUT.length, 8)
        for layer, heads in enumerate(WINDOWS):
            plan = check_for(method.plan(q, q, CallContext(LAYOUT, layer, 2)), q, q)
            own = SlidingTileMethod(window=heads, tile=TILE)
            assert torch.equal(plan.to_mask(), own.plan(q, q, CallContext(LAYOUT)).to_mask())

    def test_steps_run_the_windows_of_their_segment(self, tmp_path: Path):
        other = tuple(heads[::-1] for heads in WINDOWS)
        table = replace(TABLE, windows=(WINDOWS, other), segments=(0, 1, 1))
        path = str(save_table(table, tmp_path / "windows.json"))
        method = SlidingTileMethod(table=path)
        assert method.scope == "segment"
        q = torch.zeros(1, 2, LAYOUT.length, 8)
        for step, windows in enumerate((WINDOWS, other, other)):
            context = CallContext(LAYOUT, 1, 2, step, 3)
            assert method.segment(context) == (step > 0)
            own = SlidingTileMethod(window=windows[1], tile=TILE)
            got, want = (m.plan(q, q, context).to_mask() for m in (method, own))
            assert torch.equal(got, want)
        for context in (CallContext(LAYOUT, 0, 2), CallContext(LAYOUT, 0, 2, 1, 4)):
            with pytest.raises(ValueError, match=r"Expected .*denoising step"):
                method.plan(q, q, context)

    @pytest.mark.parametrize(
        "context",
        [CallContext(LAYOUT, 0, 3), CallContext(TokenLayout.of(TokenGrid(4, 8, 9)), 0, 2)],
    )
    def test_another_model_or_size_is_refused(self, tmp_path: Path, context: CallContext):
        method = SlidingTileMethod(table=str(save_table(TABLE, tmp_path / "windows.json")))
        q = torch.zeros(1, 2, 1, 8)
        with pytest.raises(ValueError, match="the grid 4x8x8 and 2 layers, for which"):
            method.plan(q, q, context)

    def test_gaps_are_refused(self):
        with pytest.raises(ValueError, match="a window for each layer and head, got gaps"):
            replace(TABLE, windows=(((FRAME,), ()),))
