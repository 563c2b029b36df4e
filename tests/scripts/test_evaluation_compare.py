"""Methods at equal time, on curves made by hand and on one call."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.grid import TextSpan, TokenGrid, TokenLayout
from scripts.evaluation import compare
from scripts.evaluation.compare import NAMES, Point, error_at, points_of, table, variants_for
from scripts.evaluation.probe import Capture


def point(name: str, time: float, error: float, head: int = 0, kind: str = "local") -> Point:
    return Point(0, head, 0, kind, name, density=time, time=time, error=error)


def test_errors_between_points_lie_on_a_power_law():
    curve = [point("PSA", t, 3 * t**-2) for t in (0.1, 0.4, 0.2)]
    for time in (0.1, 0.15, 0.3, 0.4):
        assert error_at(curve, time) == pytest.approx(3 * time**-2)
    assert error_at(curve, 0.09) is None
    assert error_at(curve, 0.41) is None


def test_the_better_method_wins_by_kind_of_head():
    points = []
    for head, kind in enumerate(("local", "local", "global")):
        for time in (0.1, 0.5):
            good, bad = (0.1, 0.2) if kind == "local" else (0.4, 0.3)
            points += [
                point("PSA", time, good, head, kind),
                point("skip only", time, bad, head, kind),
            ]
    rows = {(row.kind, row.time): row for row in compare.compare(points, [0.2, 0.9])}
    assert rows["local", 0.2].wins == {"skip only": 0, "PSA": 2}
    assert rows["global", 0.2].wins == {"skip only": 1, "PSA": 0}
    assert rows["all", 0.2].heads == 3
    assert rows["local", 0.2].errors["PSA"] == pytest.approx(0.1)
    assert rows["all", 0.9].errors == {}  # nothing was measured there
    text = table(list(rows.values()))
    assert "| local (2) | 20% | 20.00 (0) | - | - | **10.00** (2) | - |" in text
    assert "90%" not in text


@pytest.fixture(scope="module")
def call() -> Capture:
    torch.manual_seed(0)
    layout = TokenLayout((TokenGrid(6, 16, 16), TextSpan(20, (20, 7))))
    q, k, v = torch.randn(3, 2, layout.length, 16).unbind()
    return Capture(0, 0, layout, q, k, v)


def test_errors_fall_with_density_and_a_tail_lowers_them(call):
    densities = (0.1, 0.4)
    variants = variants_for(call, densities)
    assert {variant.name for variant in variants} == set(NAMES)
    found = list(points_of([call], dict.fromkeys(variants, 2.0), 4.0))
    assert all(p.time == 0.5 for p in found)
    errors = {(p.name, p.density, p.head): p.error for p in found}
    for head in range(2):
        for name in ("skip only", "PISA zeroth"):
            assert errors[name, 0.4, head] < errors[name, 0.1, head]
        assert errors["PISA zeroth", 0.1, head] < errors["skip only", 0.1, head]
        assert errors["PSA pooled skip", 0.1, head] < errors["PSA", 0.1, head]


def test_densities_of_less_than_a_block_are_left_out(call):
    names = {v.name for v in variants_for(call, (0.02,))}
    assert "PISA zeroth" not in names
