"""The timing protocol on a clock that only the timed work moves."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from dit_sparse import bench
from dit_sparse.bench import Timing, environment, time_interleaved


class Clock:
    """Stands for `time.perf_counter`; seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Work:
    """Takes the given seconds, one after another, and notes its name when called."""

    def __init__(self, name: str, clock: Clock, log: list[str], *seconds: float) -> None:
        self.name, self.clock, self.log = name, clock, log
        self.seconds = iter(seconds)

    def __call__(self) -> None:
        self.log.append(self.name)
        self.clock.now += next(self.seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(bench, "time", clock)
    return clock


def test_rounds_take_turns_and_warmup_is_not_timed(clock: Clock):
    log: list[str] = []
    work = {
        "a": Work("a", clock, log, 50.0, 60.0, 0.001, 0.005, 0.002),
        "b": Work("b", clock, log, 70.0, 80.0, 0.010, 0.030, 0.020),
    }
    times = time_interleaved(work, "cpu", rounds=3, warmup=2)
    assert "".join(log[:6]) == "aabbab"
    assert all({*log[at : at + 2]} == {"a", "b"} for at in (6, 8))
    assert times["a"].rounds == pytest.approx((1.0, 5.0, 2.0), abs=1e-6)
    assert times["b"].rounds == pytest.approx((10.0, 30.0, 20.0), abs=1e-6)
    assert times["a"].median == pytest.approx(2.0)
    assert times["b"].median == pytest.approx(20.0)
    assert list(times) == ["a", "b"]


def test_nobody_always_runs_behind_the_same_one(clock: Clock):
    log: list[str] = []
    work = {name: Work(name, clock, log, *[1.0] * 20) for name in "abcd"}
    time_interleaved(work, "cpu", rounds=20, warmup=0)
    assert all({*log[at : at + 4]} == {*"abcd"} for at in range(0, 80, 4))
    before = {(one, other) for one, other in pairwise(log) if one != other}
    assert len(before) == 12


def test_without_warmup(clock: Clock):
    log: list[str] = []
    times = time_interleaved({"a": Work("a", clock, log, 0.5, 1.5)}, "cpu", rounds=2, warmup=0)
    assert times["a"].median == pytest.approx(1000.0)
    assert len(log) == 2


def test_the_spread_is_half_the_quartile_distance():
    assert Timing((4.0,) * 5).spread == 0.0
    # Quartiles 2 and 6 around a median of 4.
    assert Timing((1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)).spread == pytest.approx(0.5)
    assert Timing((1.0, 1.0, 100.0)).median == 1.0


@pytest.mark.parametrize("rounds", [1, 0, -3])
def test_refuses_too_few_rounds(rounds: int):
    def never() -> None:
        pytest.fail("nothing may run")

    with pytest.raises(ValueError, match=f"at least 2 rounds, got {rounds}"):
        time_interleaved({"a": never}, "cpu", rounds=rounds)


def test_the_environment_says_what_a_figure_depends_on():
    record = environment("cpu")
    assert {
        "python",
        "torch",
        "triton",
        "diffusers",
        "transformers",
        "dit-sparse",
        "device",
    } == set(record)
    assert record["torch"] == torch.__version__
    assert record["device"]


@pytest.mark.gpu
def test_device_events_time_the_work_on_a_gpu():
    x = torch.randn(4096, 4096, device="cuda")
    times = time_interleaved({"one": lambda: x @ x, "four": lambda: x @ x @ x @ x @ x}, "cuda")
    ratio = times["four"].median / times["one"].median
    assert 3.0 < ratio < 5.0
    record = environment("cuda")
    assert {"device", "capability", "multiprocessors", "cuda", "cudnn"} <= set(record)
