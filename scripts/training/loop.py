"""The training loop, the same for every stage."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scripts.training.buckets import Bucket, pick
from scripts.training.clock import Clock
from scripts.training.peers import Peers
from scripts.training.prefetch import Batch, Prefetch
from scripts.training.state import Trained
from scripts.training.step import Step

#: Steps after which several processes ask for the time again.
_ASKED = 10


@dataclass(frozen=True, eq=False)
class Randomness:
    """Sources of randomness of one step. They depend on nothing that a resume would lose.

    Args:
        data: on the CPU, for clips.
        chance: for choices on the host.
        noise: on the training device.
    """

    data: torch.Generator
    chance: random.Random
    noise: torch.Generator


class Task(Protocol):
    """What is learnt."""

    def batch(self, bucket: Bucket, draws: Randomness) -> Batch:
        """Tensors for a step, without gradients; made ahead, in another thread."""

    def loss(self, model: nn.Module, batch: Batch, draws: Randomness) -> Tensor:
        """The loss of a batch, a scalar."""


@dataclass(frozen=True)
class Plan:
    """How to train.

    Args:
        buckets: sizes of batches.
        lr: peak learning rate.
        clock: the run's box.
        seed: of the data; a step has the same data after every resume, unless examples are used
            more than once.
        log_every: steps.
        save_every: minutes.
        sample_every: minutes.
    """

    buckets: Sequence[Bucket]
    lr: float
    clock: Clock
    seed: int = 0
    log_every: int = 25
    save_every: float = 2.0
    sample_every: float = 3.0


@dataclass(frozen=True)
class Hooks:
    """What happens beside training, on the main process; each gets the step.

    Args:
        log: gets a line of the history.
        save: writes a checkpoint.
        sample: draws a picture of the present state.
    """

    log: Callable[[dict[str, Any]], None]
    save: Callable[[int], None]
    sample: Callable[[int], None]


@dataclass
class _Window:
    """Sums since the last line of the history; `loss` and `norm` stay on the device."""

    loss: Tensor
    norm: Tensor
    steps: int = 0
    samples: int = 0
    since: float = 0.0


def _fresh(device: torch.device) -> _Window:
    loss, norm = torch.zeros(2, device=device)
    return _Window(loss, norm, since=time.monotonic())


@dataclass
class _Progress:
    """How far a run is: it began at step `first` and is at `step`.

    `minutes` are those of the main process's clock when it was last asked. The learning rate goes
    by them, as it has to be the same in all processes.
    """

    plan: Plan
    first: int
    step: int
    window: _Window
    samples: int = 0
    minutes: float = 0.0
    last: float | None = None
    next: dict[str, float] = field(default_factory=dict)

    @property
    def done(self) -> int:
        return self.step - self.first

    def rate(self) -> float:
        return self.plan.lr * self.plan.clock.rate(self.done, self.minutes)

    def over(self, peers: Peers) -> bool:
        """Whether the box is used up. Several processes ask the main one now and then."""
        if peers.count == 1 or self.done % _ASKED == 0:
            self.minutes = peers.agree(self.plan.clock.elapsed())
        return self.plan.clock.progress(self.done, self.minutes) >= 1

    def add(self, loss: Tensor, norm: Tensor, processes: int) -> None:
        count = pick(self.plan.buckets, self.plan.seed, self.step).batch * processes
        self.step += 1
        self.samples += count
        self.window.loss += loss
        self.window.norm += norm
        self.window.steps += 1
        self.window.samples += count

    def due(self, event: str) -> bool:
        every = {"save": self.plan.save_every, "sample": self.plan.sample_every}[event]
        now = self.plan.clock.elapsed()
        if now < self.next.setdefault(event, now + every):
            return False
        self.next[event] = now + every
        return True

    def line(self) -> dict[str, Any]:
        """A line of the history; waits for the device."""
        window, self.window = self.window, _fresh(self.window.loss.device)
        loss, norm = (float(total) / window.steps for total in (window.loss, window.norm))
        if not math.isfinite(loss):
            raise RuntimeError(
                f"Expected a finite loss, got {loss} before step {self.step}. The last checkpoint "
                "is kept: resume from it with a lower --lr or another --seed."
            )
        self.last = loss
        return {
            "step": self.step,
            "loss": loss,
            "gradient": norm,
            "lr": self.rate(),
            "samples_per_second": window.samples / (time.monotonic() - window.since),
            "minutes": self.plan.clock.elapsed(),
        }

    def record(self) -> dict[str, Any]:
        return {
            "steps": self.done,
            "samples": self.samples,
            "minutes": round(self.plan.clock.elapsed(), 2),
            "loss": self.last,
        }


def train(
    peers: Peers,
    model: nn.Module,
    trained: Trained,
    task: Task,
    plan: Plan,
    hooks: Hooks,
    step: int,
) -> dict[str, Any]:
    """Trains until the box is used up and returns what was done.

    The host waits for the device only to write a line of the history.

    Args:
        peers: the processes that train; all must start with the same weights.
        model: `trained.model`, prepared.
        trained: what changes.
        task: what is learnt.
        plan: how.
        hooks: what happens beside it.
        step: steps done by earlier runs.

    Raises:
        RuntimeError: the loss is no longer finite.
    """
    seed, rank, device = plan.seed, peers.rank, peers.device

    def batch_of(step: int) -> Batch:
        return task.batch(pick(plan.buckets, seed, step), _randomness(seed, step, rank, device))

    batches = Prefetch(batch_of, step, device)
    learn = Step(peers, model, trained, task, batches)
    draws = _randomness(seed, step, rank, device)
    try:
        progress = _Progress(plan, first=step, step=step, window=_fresh(device))
        while not progress.over(peers):
            _reseed(draws, seed, progress.step, rank)
            loss, norm = learn(batches.next(), draws, progress.rate())
            progress.add(loss, norm, peers.count)
            if progress.done % plan.log_every == 0 or plan.clock.steps == progress.done:
                hooks.log(progress.line())
            for event, hook in (("save", hooks.save), ("sample", hooks.sample)):
                if progress.due(event):
                    hook(progress.step)
    finally:
        batches.close()
        learn.close()
    hooks.save(progress.step)
    hooks.sample(progress.step)
    return progress.record()


def _randomness(seed: int, step: int, rank: int, device: torch.device) -> Randomness:
    draws = Randomness(torch.Generator(), random.Random(), torch.Generator(device))
    _reseed(draws, seed, step, rank)
    return draws


def _reseed(draws: Randomness, seed: int, step: int, rank: int) -> None:
    key = random.Random(f"{seed} {step} {rank}").getrandbits(62)
    draws.data.manual_seed(key)
    draws.chance.seed(key)
    draws.noise.manual_seed(key)
