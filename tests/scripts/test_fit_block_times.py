"""The times that windows are chosen by are those of the last measurements."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dit_sparse import block_times  # noqa: E402
from scripts.fit_block_times import NAMES, Measured, fit, measured  # noqa: E402
from scripts.launches.fit import PASS  # noqa: E402

SHAPE = "WindowShape(window={}, stride={}, tile={})"


def row_of(tokens: int, **kind: Any) -> dict[str, Any]:
    row = {"tokens": tokens, "heads": 12, "head_dim": 128, "pattern": "random", "density": None}
    return row | {"grid": None, "window": None, "text": 0, "variant": "triton", "ms": 1.0} | kind


def window_of(grid: str, window: str, stride: str, tile: str) -> dict[str, Any]:
    frames, height, width = map(int, grid.split("x"))
    shape = SHAPE.format(window, stride, tile)
    tokens = frames * height * width
    return row_of(tokens, grid=grid, window=shape, pattern="window", variant="ordered")


def test_a_fit_finds_what_made_the_times(tmp_path: Path) -> None:
    times = {"WHOLE": 1.5, "SHORT": 1.75, "PRODUCT": 0.25, "ROW": 3.0}
    rows = [
        row_of(16_384, density=0.2),
        row_of(32_768, density=0.1, pattern="clustered"),
        row_of(32_768, density=0.2, variant="flash"),
        row_of(4_096, density=0.2),
        row_of(32_768, density=0.2, head_dim=64),
        window_of("8x64x32", "(4, 24, 24)", "(2, 8, 8)", "(2, 8, 8)"),
        window_of("8x64x32", "(4, 24, 24)", "(1, 1, 1)", "(2, 8, 8)"),
        window_of("9x64x30", "(3, 24, 20)", "(3, 8, 5)", "(3, 8, 5)"),
    ]
    path = tmp_path / "kernels.jsonl"

    def written() -> list[Measured]:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return list(measured(path, 128))

    kept = [row for row in rows if row["tokens"] > 10_000 and row["head_dim"] == 128]
    kept.remove(rows[2])
    before = written()
    assert len(before) == len(kept)
    for row, one in zip(kept, before, strict=True):
        made = sum(t * n for t, n in zip(times.values(), one.counts, strict=True))
        row["ms"] = (made * row["heads"] / 132 + PASS * row["tokens"] * row["heads"] * 128) / 1000
    assert fit(written()) == pytest.approx(times)


def test_the_library_has_the_times_that_were_measured() -> None:
    rows = list(measured(ROOT / "benchmarks/kernels.jsonl", 128))
    assert len(rows) > 20
    found = {name: round(time, 2) for name, time in fit(rows).items()}
    assert found == {name: getattr(block_times, name) for name in NAMES}
    assert [row for row in rows if abs(row.work.time / row.time - 1) > 0.09] == []
