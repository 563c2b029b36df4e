"""What a calibration adds up, how it is kept, and the masks that are made of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse import orders
from dit_sparse.calibration_solver import (
    Settings,
    Target,
    check_target,
    forced_of,
    solve,
)
from dit_sparse.frame import frame_of
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.method import CallContext
from dit_sparse.tally import Tally
from tests.paro_cases import MODEL
from tests.selection_cases import LAYOUTS, ordered, qkv, ranges

GRID = TokenGrid(4, 8, 8)  # 256 tokens: 4 blocks of 64, all whole
LAYOUT = TokenLayout.of(GRID, 10)
SETTINGS = Settings(segments=2, block=64, least_mass=0.0)
NAMES = ("HWF", "FHW", "HWF")


def context(layer: int = 0, step: int | None = 0, layout: TokenLayout = LAYOUT) -> CallContext:
    return CallContext(layout, layer, 2, step, 4)


def qk(seed: int = 0, layout: TokenLayout = LAYOUT, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 3, layout.length, 16)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def block_sums(q: Tensor, k: Tensor, layout: TokenLayout, name: str, head: int) -> Tensor:
    """fp64 `[n, n]` of the picture's blocks, summed over the batch, from the whole map."""
    frame = frame_of(layout, 64, name)
    q, k = (ordered(x, frame)[:, head].double() for x in (q, k))
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if frame.hidden is not None:
        scores = scores.masked_fill(frame.hidden[:, None, frame.blocks.of_token], -torch.inf)
    weights = scores.softmax(-1)
    picture = [r for r, c in zip(ranges(frame.blocks), frame.context, strict=True) if not c]
    return torch.stack(
        [torch.stack([weights[:, list(i)][:, :, list(j)].sum() for j in picture]) for i in picture]
    )


def filled() -> Tally:
    """Both layers and both segments, one map each."""
    tally = Tally(64)
    for layer in range(2):
        tally.compare_orders(*qk(layer), context(layer))
        for step, segment in ((0, 0), (2, 1)):
            names = tally.orders(layer, "paper")
            tally.add_maps(*qk(10 + 2 * layer + segment), context(layer, step), names, segment)
    tally.finished = 2
    return tally


class TestSums:
    @pytest.mark.parametrize("layout", ["text", "padding", "ragged"])
    def test_every_head_in_its_order(self, layout: str):
        """Against the whole map in float64; padding differs between batch entries."""
        q, k, _ = qkv(layout)
        tally = Tally(64)
        tally.add_maps(q, k, context(layout=LAYOUTS[layout]), NAMES, 0)
        for head, name in enumerate(NAMES):
            expected = block_sums(q, k, LAYOUTS[layout], name, head).float()
            torch.testing.assert_close(tally.sums[0, 0][head], expected, rtol=1e-5, atol=1e-5)
        assert tally.calls == {(0, 0): 2}

    def test_prompts_and_steps_add_up(self):
        tally, one, two = Tally(64), Tally(64), Tally(64)
        for other, seed in ((one, 1), (two, 2)):
            tally.add_maps(*qk(seed), context(), NAMES, 0)
            other.add_maps(*qk(seed), context(), NAMES, 0)
        torch.testing.assert_close(tally.sums[0, 0], one.sums[0, 0] + two.sums[0, 0])

    def test_metrics_are_means_before_they_are_compared(self):
        tally = Tally(64)
        for seed in range(3):
            tally.compare_orders(*qk(seed), context(1, seed))
        parts = []
        for seed in range(3):
            part = Tally(64)
            part.compare_orders(*qk(seed), context(1, seed))
            parts.append(part.metrics[1])
        torch.testing.assert_close(tally.metrics[1], torch.stack(parts).sum(0))
        assert tally.calls[1,] == 6
        assert len(tally.orders(1, "concentration")) == 3

    def test_an_image_has_two_orders(self):
        assert Tally(64).candidates(TokenGrid(1, 8, 8)) == ("FHW", "FWH")
        assert Tally(64).candidates(GRID) == orders.AXES
        assert Tally(64).candidates(TokenGrid(1, 1, 8)) == ("FHW",)

    def test_calls_of_two_sizes_are_refused(self):
        tally = Tally(64)
        tally.compare_orders(*qk(), context())
        other = TokenLayout.of(TokenGrid(4, 8, 4), 10)
        with pytest.raises(ValueError, match=r"grid=TokenGrid.*Calibrate one size"):
            tally.compare_orders(*qk(layout=other), context(layout=other))

    def test_text_of_another_length_is_welcome(self):
        tally = Tally(64)
        tally.add_maps(*qk(), context(), NAMES, 0)
        other = TokenLayout.of(GRID, 70)
        tally.add_maps(*qk(layout=other), context(layout=other), NAMES, 0)
        assert tally.facts is not None
        assert tally.facts.text == 10

    def test_a_step_must_be_known(self):
        with pytest.raises(ValueError, match="Calibrate the pipeline that will run"):
            Tally(64).compare_orders(*qk(), context(step=None))


KEPT = {"block": 64, "segments": 2, "prompts": "abc"}


class TestProgress:
    def test_it_comes_back(self, tmp_path: Path):
        tally, path = filled(), tmp_path / "new" / "progress.safetensors"
        tally.save(path, KEPT)
        got = Tally.load(path, KEPT)
        assert (got.block, got.facts, got.finished) == (64, tally.facts, 2)
        assert got.calls == tally.calls
        for mine, its in ((got.sums, tally.sums), (got.metrics, tally.metrics)):
            assert mine.keys() == its.keys()
            assert all(torch.equal(mine[key], its[key]) for key in its)
        assert [got.orders(n, "paper") for n in (0, 1)] == [
            tally.orders(n, "paper") for n in (0, 1)
        ]

    def test_no_file_is_a_beginning(self, tmp_path: Path):
        assert Tally.load(tmp_path / "none", KEPT).finished == 0

    def test_other_settings_are_refused(self, tmp_path: Path):
        path = tmp_path / "progress.safetensors"
        filled().save(path, KEPT)
        with pytest.raises(ValueError, match=r"where segments is 2, got 3\. .*delete progress"):
            Tally.load(path, KEPT | {"segments": 3})

    @pytest.mark.parametrize("left", [0, 20, 0.5])
    def test_a_truncated_file(self, left: int | float, tmp_path: Path):
        path = tmp_path / "progress.safetensors"
        filled().save(path, KEPT)
        data = path.read_bytes()
        path.write_bytes(data[: left if isinstance(left, int) else int(left * len(data))])
        with pytest.raises(ValueError, match=r"got a damaged file .*Delete it to begin anew"):
            Tally.load(path, KEPT)


class TestSolve:
    def test_by_density(self):
        tally = filled()
        found = solve(tally, SETTINGS, Target(density=0.5), MODEL, {"prompts": "abc"})
        assert (found.grid, found.segments) == (GRID, (0, 0, 1, 1))
        for segment in range(2):
            for layer in range(2):
                mask = found.mask(segment, layer)
                assert mask.sum() == 24  # half of 3 heads x 4 x 4 blocks
                assert mask.any(-1).all()
                torch.testing.assert_close(found.density[segment, layer], mask.float().mean((1, 2)))
                shares = tally.sums[segment, layer] / tally.sums[segment, layer].sum(-1, True)
                kept = (shares * mask).sum(-1).mean(-1)
                torch.testing.assert_close(found.kept_mass[segment, layer], kept)
        assert found.order_names(1) == tally.orders(1, "concentration")
        assert found.provenance["achieved_density"] == 0.5
        assert found.provenance["target"] == {"density": 0.5, "mass": None}
        assert found.provenance["settings"]["block"] == 64

    def test_by_mass(self):
        found = solve(filled(), SETTINGS, Target(mass=0.6), MODEL, {})
        assert (found.kept_mass >= 0.6 - 1e-6).all()
        assert (found.density < 1).all()

    def test_heads_for_themselves(self):
        settings = Settings(segments=2, block=64, least_mass=0.0, budget="head")
        found = solve(filled(), settings, Target(density=0.5), MODEL, {})
        assert (found.density == 0.5).all()

    def test_heads_that_keep_too_little_are_dense_and_listed(self):
        settings = Settings(segments=2, block=64, least_mass=0.52, budget="head")
        found = solve(filled(), settings, Target(density=0.5), MODEL, {})
        weak = {tuple(place) for place in (found.kept_mass < 0.52).nonzero().tolist()}
        assert set(found.dense_heads) == weak
        assert weak
        for segment, layer, head in weak:
            assert found.mask(segment, layer)[head].all()
            assert found.density[segment, layer, head] == 1.0
        assert found.provenance["achieved_density"] == pytest.approx(found.density.mean().item())

    def test_short_blocks_are_read_in_any_case(self):
        """P8."""
        forced = forced_of(TokenGrid(1, 10, 20), 64)
        assert forced[-1].all()
        assert forced[:, -1].all()
        assert not forced[:-1, :-1].any()
        assert not forced_of(GRID, 64).any()

    def test_a_segment_that_no_step_ran(self):
        tally = filled()
        for layer in range(2):
            del tally.sums[1, layer]
        found = solve(tally, SETTINGS, Target(density=0.5), MODEL, {})
        assert set(found.masks) == {0}
        assert found.provenance["achieved_density"] == 0.5

    def test_the_criterion_reaches_the_orders(self):
        tally = Tally(64)
        at = GRID.coordinates()
        one_hot = torch.nn.functional.one_hot(at[:, 1] * 8 + at[:, 2], 64).float()
        x = torch.cat([torch.zeros(10, 64), 9 * one_hot])[None, None].expand(1, 3, -1, -1)
        for layer in range(2):
            tally.compare_orders(x, x, context(layer))
        assert set(tally.orders(0, "concentration")) <= {"HWF", "WHF", "HFW", "WFH"}


class TestRefusals:
    @pytest.mark.parametrize("numbers", [{}, {"density": 0.3, "mass": 0.9}], ids=str)
    def test_one_target(self, numbers: dict[str, float]):
        with pytest.raises(ValueError, match=r"Expected a density or a mass .*Give one"):
            Target(**numbers)

    @pytest.mark.parametrize("value", [0.0, -0.1, 1.1, float("nan"), True])
    def test_shares(self, value: float):
        with pytest.raises(ValueError, match="Expected a mass above 0 and at most 1"):
            Target(mass=value)

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"segments": 0}, "segments to be an integer of at least 1, got 0"),
            ({"every": 1.5}, "every to be an integer"),
            ({"block": 32}, "a block of 64 or 128"),
            ({"split": "thirds"}, "Expected split among uniform, halves"),
            ({"criterion": "best"}, "Expected criterion among paper, concentration"),
            ({"budget": "model"}, "Expected budget among layer, head"),
            ({"least_mass": 2}, "Expected a least_mass from 0 to 1"),
            ({"seed": -1}, "Expected a seed"),
        ],
        ids=str,
    )
    def test_settings(self, change: dict[str, Any], sentence: str):
        with pytest.raises(ValueError, match=sentence):
            Settings(**change)

    def test_a_density_that_forced_blocks_exceed(self):
        with pytest.raises(ValueError, match=r"Expected a density of at least 0\.4375"):
            check_target(Target(density=0.4), TokenGrid(1, 10, 20), 64)
        check_target(Target(density=0.7), TokenGrid(1, 10, 20), 64)
        check_target(Target(mass=0.1), TokenGrid(1, 10, 20), 64)


def test_it_says_nothing(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG):
        solve(filled(), SETTINGS, Target(density=0.5), MODEL, {})
    assert not caplog.records
