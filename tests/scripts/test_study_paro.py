"""The study of orders and of 8 bits on a toy pipeline folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from dit_sparse.grid import TextSpan, TokenGrid, TokenLayout
from scripts import study_paro
from scripts.evaluation.order_figures import map_in_order
from scripts.evaluation.probe import Capture
from scripts.evaluation.rounding import exact, measure, table
from tests.toy_model import save_toy_model


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_model(tmp_path_factory.mktemp("models") / "toy")


def run(command: str, toy: Path, to: Path, *more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [command, "--model", str(toy), "--to", str(to), "--size", "9x96x96", "--steps", "2"]
    words += ["--calibrated-on", "1", "--tested-on", "1", "--segments", "1", "--at", "0.5"]
    monkeypatch.setattr(sys, "argv", ["study_paro.py", *words, "--device", "cpu", *more])
    study_paro.main()


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_orders_and_pictures_share_calibrations(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--criteria", "concentration,raster", "--densities", "0.6")
    run("orders", toy, tmp_path, *more, monkeypatch=monkeypatch)
    one, raster = lines_of(tmp_path / "orders.jsonl")
    assert (one["criterion"], raster["criterion"]) == ("concentration", "raster")
    for row in (one, raster):
        assert row["density"] == pytest.approx(0.6, abs=0.08)
        assert row["dense_heads"] == 0
        assert 5 < row["psnr"] < 200
    assert "| raster | 0.6 |" in (tmp_path / "orders.md").read_text()
    kept = tmp_path / "calibrations" / "concentration-0.6" / "calibration.json"
    before = kept.stat().st_mtime_ns
    run("pictures", toy, tmp_path, *more, monkeypatch=monkeypatch)
    assert kept.stat().st_mtime_ns == before
    assert (tmp_path / "orders.webp").stat().st_size > 0


def test_rounding(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("rounding", toy, tmp_path, "--layers", "0", monkeypatch=monkeypatch)
    rows = {row["rounding"]: row for row in lines_of(tmp_path / "rounding.jsonl")}
    assert rows["none"]["error"] < 1e-5
    assert rows["none"]["error"] < rows["int8 emulated"]["error"] < rows["fp8 emulated"]["error"]
    assert rows["fp8 emulated"]["error"] < rows["int4 emulated"]["error"]
    assert "| int8 emulated |" in (tmp_path / "rounding.md").read_text()


def capture(layout: TokenLayout) -> Capture:
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, layout.length, 16, generator=source) for _ in range(3))
    return Capture(layer=0, step=0, layout=layout, q=q, k=k, v=v)


def test_exact_attention_is_that_of_torch_and_bars_are_held() -> None:
    found = capture(TokenLayout.of(TokenGrid(3, 8, 8), 7))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.double() for x in (found.q, found.k, found.v))
    )
    torch.testing.assert_close(exact(found), expected)
    text = table(list(measure([found])))
    assert "0.999 met" in text
    assert "missed" not in text


def test_rounding_beside_padded_text_of_a_batch() -> None:
    """What was captured is the first entry alone, the layout is that of all."""
    found = capture(TokenLayout((TokenGrid(3, 8, 8), TextSpan(20, (20, 5)))))
    rows = {row["rounding"]: row for row in measure([found])}
    assert rows["none"]["error"] < 1e-5


def test_a_map_in_an_order_is_the_map_permuted() -> None:
    layout = TokenLayout.of(TokenGrid(3, 4, 5), 7)
    from dit_sparse import orders

    order = orders.axes(layout.grid, "WHF")
    plain, moved = (map_in_order(capture(layout), 1, o) for o in (None, order))
    torch.testing.assert_close(moved, plain[order.index][:, order.index])
    assert (plain.sum(1) < 1).all()  # text has its part
