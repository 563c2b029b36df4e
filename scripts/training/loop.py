"""The training loop, the same for every stage."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scripts.training.buckets import Bucket, pick
from scripts.training.clock import Clock
from scripts.training.state import Trained


class Loss(Protocol):
    """The loss of a batch made for a bucket, all randomness from the generator and `chance`."""

    def __call__(
        self, model: nn.Module, bucket: Bucket, generator: torch.Generator, chance: random.Random
    ) -> Tensor: ...


@dataclass(frozen=True)
class Plan:
    """How to train.

    Args:
        buckets: sizes of batches.
        lr: peak learning rate.
        clock: the run's box.
        seed: of the data; a step has the same data after every resume.
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
    samples: int = 0
    since: float = 0.0


def train(
    accelerator: Any,
    model: nn.Module,
    trained: Trained,
    loss: Loss,
    plan: Plan,
    hooks: Hooks,
    step: int,
) -> dict[str, Any]:
    """Trains until the box is used up and returns what was done.

    The host waits for the device only to write a line of the history.

    Args:
        accelerator: an `accelerate.Accelerator`.
        model: the prepared model, over `trained.model`.
        trained: what changes.
        step: steps done by earlier runs.

    Raises:
        RuntimeError: the loss is no longer finite.
    """
    first, samples, line = step, 0, {}
    window = _fresh(accelerator.device)
    due = {"save": plan.save_every, "sample": plan.sample_every}
    while not _over(accelerator, plan.clock, step - first):
        bucket = pick(plan.buckets, plan.seed, step)
        for group in trained.optimizer.param_groups:
            group["lr"] = plan.lr * plan.clock.rate(step - first)
        generator, chance = _randomness(accelerator, plan.seed, step)
        value = loss(model, bucket, generator, chance)
        accelerator.backward(value)
        norm = accelerator.clip_grad_norm_(trained.model.parameters(), 1.0)
        trained.optimizer.step()
        trained.optimizer.zero_grad(set_to_none=True)
        trained.average.update(trained.model)
        step += 1
        window.loss += value.detach()
        window.norm += norm.detach()
        window.samples += bucket.batch * accelerator.num_processes
        samples += bucket.batch * accelerator.num_processes
        if (step - first) % plan.log_every == 0 or plan.clock.steps == step - first:
            line = _line(window, plan, trained, step, first)
            hooks.log(line)
            window = _fresh(accelerator.device)
        for event, hook in (("save", hooks.save), ("sample", hooks.sample)):
            if plan.clock.elapsed() > due[event]:
                hook(step)
                due[event] = plan.clock.elapsed() + getattr(plan, f"{event}_every")
    hooks.save(step)
    hooks.sample(step)
    return {
        "steps": step - first,
        "samples": samples,
        "minutes": round(plan.clock.elapsed(), 2),
        "loss": line.get("loss"),
    }


def _over(accelerator: Any, clock: Clock, step: int) -> bool:
    """Whether the box is used up; the main process decides, now and then, for all."""
    if accelerator.num_processes == 1:
        return clock.progress(step) >= 1
    if step % 10 and (clock.steps is None or step < clock.steps):
        return False
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([clock.progress(step) >= 1])[0]


def _randomness(accelerator: Any, seed: int, step: int) -> tuple[torch.Generator, random.Random]:
    """Sources of randomness of a step: they depend on nothing that a resume would lose."""
    key = random.Random(f"{seed} {step} {accelerator.process_index}").getrandbits(62)
    return torch.Generator(accelerator.device).manual_seed(key), random.Random(key)


def _fresh(device: torch.device) -> _Window:
    loss, norm = torch.zeros(2, device=device)
    return _Window(loss, norm, since=time.monotonic())


def _line(window: _Window, plan: Plan, trained: Trained, step: int, first: int) -> dict[str, Any]:
    count = (step - first - 1) % plan.log_every + 1
    loss, norm = float(window.loss) / count, float(window.norm) / count
    if not math.isfinite(loss):
        raise RuntimeError(
            f"Expected a finite loss, got {loss} before step {step}. The last checkpoint is kept: "
            "resume from it with a lower --lr or another --seed."
        )
    return {
        "step": step,
        "loss": loss,
        "gradient": norm,
        "lr": trained.optimizer.param_groups[0]["lr"],
        "samples_per_second": window.samples / (time.monotonic() - window.since),
        "minutes": plan.clock.elapsed(),
    }
