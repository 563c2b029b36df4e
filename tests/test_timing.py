"""The timer of `dit-sparse sample`, on a clock that the test turns by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dit_sparse.commands import timing
from dit_sparse.commands.timing import DenoisingTimer


class Clock:
    """Stands in for the time module."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Transformer(nn.Module):
    """Takes a number of seconds, half of them in a hook that was there before the timer."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds
        self.register_forward_pre_hook(self._spend)

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.seconds / 2
        return x

    def _spend(self, module: nn.Module, inputs: object) -> None:
        self.clock.now += self.seconds / 2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def denoise(clock: Clock, timer: DenoisingTimer, steps: int, forwards: int) -> None:
    """Steps of some forwards, each step one second longer than the one before, 10 s apart."""
    clock.now += 100  # prompt encoding
    for step in range(steps):
        for transformer in timer.transformers[:1] * forwards:
            transformer.seconds = (step + 1) / forwards
            transformer(torch.zeros(1))
        clock.now += 10 if step < steps - 1 else 1000  # the scheduler; in the end, decoding


@pytest.mark.parametrize("forwards", [1, 2])
def test_steps_are_told_apart(clock: Clock, forwards: int) -> None:
    with DenoisingTimer([Transformer(clock, 1)], torch.device("cpu")) as timer:
        denoise(clock, timer, 3, forwards)
    assert timer.step_seconds(3) == pytest.approx([11, 12, 3])
    assert timer.seconds() == pytest.approx(26)


def test_forwards_that_do_not_divide_into_steps(clock: Clock) -> None:
    with DenoisingTimer([Transformer(clock, 1)], torch.device("cpu")) as timer:
        denoise(clock, timer, 3, 1)
    assert timer.step_seconds(2) == []
    assert timer.step_seconds(0) == []


def test_two_transformers_are_one_denoising(clock: Clock) -> None:
    first, second = Transformer(clock, 2), Transformer(clock, 3)
    with DenoisingTimer([first, second], torch.device("cpu")) as timer:
        first(torch.zeros(1))
        second(torch.zeros(1))
    assert timer.step_seconds(2) == pytest.approx([2, 3])


def test_nothing_stays_on_the_transformer(clock: Clock) -> None:
    transformer = Transformer(clock, 1)
    with DenoisingTimer([transformer], torch.device("cpu")) as timer:
        pass
    transformer(torch.zeros(1))
    assert timer.begins == []
    assert timer.seconds() == 0.0
    assert timer.step_seconds(1) == []
    assert len(transformer._forward_pre_hooks) == 1
    assert not transformer._forward_hooks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_time_is_that_of_the_device() -> None:
    module = nn.Linear(8192, 8192, device="cuda")
    x = torch.zeros(8192, 8192, device="cuda")
    with torch.no_grad(), DenoisingTimer([module], torch.device("cuda")) as timer:
        for _ in range(4):
            module(x)
    # 1.1 TFLOP a call: no GPU does it in less than a tenth of a millisecond.
    assert timer.seconds() > 4e-4
    assert sum(timer.step_seconds(4)) == pytest.approx(timer.seconds(), rel=1e-3)
