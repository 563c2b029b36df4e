"""`dit-sparse plan`: what it prints, writes and refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from dit_sparse.cli import app
from dit_sparse.commands.methods import Wording
from dit_sparse.grid import TokenGrid
from dit_sparse.methods.window import WindowMethod

WAN = ("--grid", "21x45x80", "--window", "9x15x24")


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["plan", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_table_names_the_best_as_options_of_the_method() -> None:
    lines = run(*WAN, "--top", "3").stdout.splitlines()
    assert lines[0].startswith(
        "grid 21x45x80, window 9x15x24, blocks of 128; the window alone: 23."
    )
    assert lines[2].split()[:4] == ["3x5x8", "3x5x8", "0.0429", "17010"]
    assert lines[5].split()[1] == "1x1x1"  # windows of one's own are always shown
    options = [word for word in lines[-1].split() if "=" in word]
    shape = Wording("window", tuple(options)).method().shape_on(TokenGrid(21, 45, 80))
    assert (shape.window, shape.tile) == ((9, 15, 24), (3, 5, 8))


@pytest.mark.parametrize("flag", [("--json",), ("--format", "json")])
def test_json(flag: tuple[str, ...]) -> None:
    report = json.loads(run(*WAN, *flag, "--top", "2", "--text", "100").stdout)
    assert (report["grid"], report["window"], report["text"]) == ([21, 45, 80], [9, 15, 24], 100)
    assert len(report["candidates"]) == 3
    assert report["best"] == report["candidates"][0]
    best = report["best"]
    assert best["visited"] == best["full"] + best["partial"]
    assert best["bound"] == pytest.approx(best["dense"] / best["visited"])


def test_stride_tile_density_and_image_grids() -> None:
    one = json.loads(run(*WAN, "--stride", "3x5x8", "--tile", "3x5x8", "--json").stdout)
    assert one["tried"] == 1
    image = json.loads(run("--grid", "64x64", "--density", "0.2", "--json").stdout)
    assert image["grid"] == [1, 64, 64]
    assert image["best"]["density"] == pytest.approx(0.2, rel=0.3)
    shares = json.loads(run("--grid", "8x16x16", "--window", "0.5x0.5x1.0", "--json").stdout)
    assert shares["window"] == [4, 8, 16]


def test_dilation_causality_and_borders() -> None:
    words = ("--dilation", "2x1x1", "--causal", "truexfalsexfalse", "--borders", "truncated")
    report = json.loads(run(*WAN, *words, "--tile", "1x5x24", "--json").stdout)
    assert (report["dilation"], report["causal"]) == ([2, 1, 1], [True, False, False])
    assert report["borders"] == "truncated"
    lines = run(*WAN, *words, "--tile", "1x5x24", "--stride", "1").stdout.splitlines()
    options = tuple(word for word in lines[-1].split() if "=" in word)
    method = Wording("window", options).method()
    assert isinstance(method, WindowMethod)
    assert (method.dilation, method.causal) == ((2, 1, 1), (True, False, False))
    assert (method.borders, method.stride) == ("truncated", (1, 1, 1))


def test_one_number_for_all_axes_and_auto() -> None:
    flux = ("--grid", "256x256", "--window", "80", "--stride", "16", "--json")
    report = json.loads(run(*flux).stdout)
    assert (report["window"], report["best"]["stride"]) == ([1, 80, 80], [1, 16, 16])
    auto, none = (run("--grid", "32x32", *w).stdout for w in (("--window", "auto"), ()))
    assert auto == none
    assert auto == run("--grid", "32x32", "--density", "0.3").stdout


def test_large_grids_are_instant() -> None:
    run(*WAN)  # imports
    begin = time.perf_counter()
    assert run("--grid", "60x120x200", "--window", "15x30x40").exit_code == 0
    assert time.perf_counter() - begin < 5


def test_plot(tmp_path: Path) -> None:
    path = tmp_path / "plan.png"
    assert run(*WAN, "--plot", str(path)).exit_code == 0
    with Image.open(path) as picture:
        assert len(picture.convert("L").getcolors(256) or []) > 10


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--grid", "21x45"), None),
        (("--grid", "21", "--window", "3x3x3"), "token grid such as 21x45x80"),
        (("--grid", "21x45x80", "--window", "9x50x24"), "window along height between 1 and 45"),
        (
            ("--grid", "21x45x80", "--window", "9x15x24", "--stride", "10x1x1"),
            "stride along frames",
        ),
        (("--grid", "21x45x80", "--window", "9x15"), "without one along frames"),
        (("--grid", "21x45x80", "--window", "0"), "at least 1 along frames, height and width"),
        ((*WAN, "--stride", "0"), "stride of at least 1 along frames, height and width"),
        ((*WAN, "--dilation", "0"), "dilation of at least 1 along frames, height and width"),
        ((*WAN, "--dilation", "1x4x1"), "window along height between 1 and 11"),
        ((*WAN, "--borders", "round"), "borders among inward, truncated"),
        (("--grid", "8x8", "--dilation", "2"), "Expected a window for dilation"),
        (("--grid", "21x45x80", "--window", "9x15xb"), "numbers such as 3x5x5"),
        (("--grid", "21x45x80", "--window", "9x9x9", "--density", "0.3"), "window or a density"),
        (("--grid", "21x45x80", "--text", "-1"), "--text of at least 0"),
        (("--grid", "21x45x80", "--top", "0"), "--top of at least 1"),
        (("--grid", "21x45x80", "--block", "100"), "block of 64 or 128"),
        (("--grid", "21x45x80", "--tile", "9x9x9"), "tile of 1 to 128 tokens"),
        (("--grid", "8x8", "--plot", "x.nothing"), "picture file for --plot"),
    ],
)
def test_bad_input_is_a_sentence(arguments: tuple[str, ...], sentence: str | None) -> None:
    result = run(*arguments)
    if sentence is None:
        assert result.exit_code == 0
    else:
        assert (result.exit_code, result.stdout) == (2, "")
        assert sentence in result.stderr
