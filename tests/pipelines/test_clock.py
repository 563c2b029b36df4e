"""The step clock: pipelines whose scheduler counts, those whose does not, bare transformers."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch

from dit_sparse.pipelines.clock import Moment, StepClock
from dit_sparse.pipelines.lengths import NotALength, text_lengths


class Scheduler:
    def __init__(self, steps: int, begin_index: int | None = None) -> None:
        self.begin_index = begin_index
        self.set_timesteps(steps)

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = torch.linspace(1000, 1, steps)
        self.step_index: int | None = None

    def step(self) -> None:
        start = self.begin_index or 0
        self.step_index = (start if self.step_index is None else self.step_index) + 1


class Pipeline:
    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler


def no_timestep() -> Any:
    class Untouchable:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError("the timestep was read, which waits for the device")

    return Untouchable()


def test_scheduler_is_asked_and_the_timestep_is_read_in_the_first_step_only() -> None:
    pipe = Pipeline(Scheduler(3))
    clock = StepClock(pipe)
    seen = []
    for step in range(3):
        timestep = no_timestep() if step else torch.tensor(1000.0)
        seen += [clock.read(timestep) for _ in ("cond", "uncond")]
        pipe.scheduler.step()
    assert [m.step for m in seen] == [0, 0, 1, 1, 2, 2]
    assert {(m.steps, m.generation) for m in seen} == {(3, seen[0].generation)}


def test_new_and_interrupted_generations_are_noticed() -> None:
    pipe = Pipeline(Scheduler(4))
    clock = StepClock(pipe)
    first = clock.read(None)
    pipe.scheduler.set_timesteps(4)  # interrupted at step 0
    second = clock.read(None)
    pipe.scheduler.step()
    same = clock.read(None)
    pipe.scheduler.set_timesteps(2)
    third = clock.read(None)
    assert (second.step, third.step, third.steps) == (0, 0, 2)
    assert len({first.generation, second.generation, third.generation}) == 3
    assert (same.step, same.generation) == (1, second.generation)


def loop(clock: StepClock, values: tuple[float, ...] = (900.0, 500.0, 100.0)) -> list[Moment]:
    """A user's own loop over the transformer, with two forwards per step."""
    return [clock.read(torch.tensor([value])) for value in values for _ in ("cond", "uncond")]


@pytest.mark.parametrize("steps", [None, 3])
def test_scheduler_that_stands_still_does_not_drive(steps: int | None) -> None:
    clock = StepClock(pipe := Pipeline(Scheduler(1000)), steps=steps)
    seen = [loop(clock) for _ in range(2)]
    assert [[m.step for m in moments] for moments in seen] == [[0, 0, 1, 1, 2, 2]] * 2
    assert {m.steps for moments in seen for m in moments[2:]} == {steps}
    assert seen[0][-1].generation == seen[0][0].generation != seen[1][0].generation
    pipe.scheduler.set_timesteps(4)  # and now it does
    clock.read(torch.tensor(1000.0))
    pipe.scheduler.step()
    last = clock.read(no_timestep())
    assert (last.step, last.steps) == (1, steps or 4)
    assert last.generation != seen[1][-1].generation


def test_scheduler_that_has_finished_does_not_drive() -> None:
    clock = StepClock(pipe := Pipeline(Scheduler(2)))
    first = clock.read(torch.tensor(1000.0))
    for _ in range(2):
        pipe.scheduler.step()
    moments = loop(clock)
    assert [m.step for m in moments] == [0, 0, 1, 1, 2, 2]
    assert {m.steps for m in moments} == {None}
    assert {m.generation for m in moments} == {first.generation + 1}
    assert clock.read(None).step is None


def test_second_pipeline_that_shares_the_transformer() -> None:
    one, other = Pipeline(Scheduler(2)), Pipeline(Scheduler(3))
    clock = StepClock(one)
    for turn in range(2):
        seen = []
        for timestep in other.scheduler.timesteps:
            seen.append(clock.read(timestep).step)
            other.scheduler.step()
        assert seen == [0, 1, 2]
        for _ in range(2 * (1 - turn)):
            one.scheduler.step()


def test_image_to_image_begins_late() -> None:
    pipe = Pipeline(Scheduler(4, begin_index=2))
    assert StepClock(pipe).read(None) == Moment(2, 4, 1)
    assert StepClock(pipe).read(torch.tensor(500.0)) == Moment(2, 4, 1)


def test_timestep_values_count_where_nothing_else_does() -> None:
    clock = StepClock(steps=3)
    values = [900.0, 900.0, 500.0, 500.0, 100.0, 900.0, 500.0]
    moments = [clock.read(torch.tensor([value, 0.0])) for value in values]
    assert [m.step for m in moments] == [0, 0, 1, 1, 2, 0, 1]
    assert moments[4].generation != moments[5].generation
    assert moments[5].generation == moments[6].generation
    assert moments[0].steps == 3
    assert clock.read(None) == Moment(None, 3, moments[6].generation)


def test_scheduler_that_does_not_count_still_says_how_many() -> None:
    scheduler = Scheduler(5)
    del scheduler.step_index
    pipe = Pipeline(scheduler)
    clock = StepClock(pipe)
    assert clock.read(torch.tensor(1000)) == Moment(0, 5, 1)
    assert clock.read(torch.tensor(800)) == Moment(1, 5, 1)


def test_pipeline_is_not_kept_alive_and_copies_follow_their_own() -> None:
    pipe = Pipeline(Scheduler(3))
    pipe.clock = StepClock(pipe)  # type: ignore[attr-defined]
    other = copy.deepcopy(pipe)
    other.scheduler.step()
    assert other.clock.read(None).step == 1
    assert pipe.clock.read(None).step == 0  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(StepClock(pipe, steps=7))).read(None).steps == 7
    clock = StepClock(pipe)
    del pipe
    gc.collect()
    assert clock.read(torch.tensor(5.0)).step == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_masks_become_lengths(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).to(dtype)
    assert text_lengths(mask) == (2, 4, 0)


@pytest.mark.parametrize("mask", [[[0, 1, 1]], [[1, 0, 1]], [[0.5, 0.5, 0.0]], [[0.0, -1e4, -1e4]]])
def test_other_masks_are_no_lengths(mask: list[list[float]]) -> None:
    assert text_lengths(torch.tensor(mask)) is None


def test_length_follows_in_place_changes() -> None:
    mask = torch.ones(1, 4)
    assert text_lengths(mask) == (4,)
    mask[0, 2:] = 0
    assert text_lengths(mask) == (2,)
    with torch.inference_mode():
        frozen = torch.ones(1, 4)
        assert text_lengths(frozen) == (4,)
        frozen[0, 1:] = 0
        assert text_lengths(frozen) == (1,)


def test_masks_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[B, L\]"):
        text_lengths(torch.ones(4))
    assert issubclass(NotALength, ValueError)
