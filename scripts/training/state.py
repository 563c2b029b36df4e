"""Everything a run needs to go on exactly where it stopped, kept on the machine that trains."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts.training.ema import Average


@dataclass(frozen=True, eq=False)
class Trained:
    """What changes during a run.

    Args:
        model: raw fp32 weights.
        average: their moving average.
        optimizer: with its moments.
    """

    model: nn.Module
    average: Average
    optimizer: torch.optim.Optimizer


def write_state(path: Path, trained: Trained, step: int, key: str) -> None:
    """Saves all of it, whole or not at all; `key` tells which checkpoint it belongs to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    content = {
        "step": step,
        "key": key,
        "model": trained.model.state_dict(),
        "average": trained.average.model.state_dict(),
        "updates": trained.average.updates,
        "optimizer": trained.optimizer.state_dict(),
    }
    torch.save(content, draft)
    draft.replace(path)


def read_state(path: Path, trained: Trained, key: str) -> int | None:
    """Restores the state that belongs to a checkpoint and returns its step, `None` without one.

    Raises:
        ValueError: the file cannot be read.
    """
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a truncated pickle can raise anything
        raise ValueError(
            f"Expected a training state in {path}, but it cannot be read ({type(error).__name__}). "
            "Delete it to resume from the shards."
        ) from error
    if content["key"] != key:
        return None
    trained.model.load_state_dict(content["model"])
    trained.average.model.load_state_dict(content["average"])
    trained.average.updates = content["updates"]
    trained.optimizer.load_state_dict(content["optimizer"])
    return content["step"]
