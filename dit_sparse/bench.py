"""The timing protocol and the environment record that every figure carries."""

from __future__ import annotations

import importlib.metadata
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import dit_sparse


@dataclass(frozen=True)
class Timing:
    """Times of one variant over the interleaved rounds, in milliseconds."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        low, _, high = statistics.quantiles(self.rounds, n=4)
        return (high - low) / 2 / self.median


def time_interleaved(
    variants: Mapping[str, Callable[[], Any]],
    device: torch.device | str,
    *,
    rounds: int = 20,
    warmup: int = 3,
) -> dict[str, Timing]:
    """Times variants in turn, round by round, so that heat and clocks treat them alike.

    Every round has an order of its own, always the same ones: a long variant at full power leaves
    lower clocks to whatever runs after it.

    Args:
        variants: what to time, by name; each call must do the whole work.
        device: where the work runs; on CUDA, device events stand around every call.
        rounds: timed calls per variant.
        warmup: untimed calls per variant before (compilation, handles, caches).
    """
    if rounds < 2:
        raise ValueError(f"Expected at least 2 rounds, got {rounds}.")
    for run in variants.values():
        for _ in range(warmup):
            run()
    clock = _cuda_clock if torch.device(device).type == "cuda" else _host_clock
    pending: dict[str, list[Callable[[], float]]] = {name: [] for name in variants}
    names, draw = list(variants), random.Random(0)
    for _ in range(rounds):
        for name in names:
            pending[name].append(clock(variants[name]))
        draw.shuffle(names)
    if clock is _cuda_clock:
        torch.cuda.synchronize(device)
    return {name: Timing(tuple(read() for read in reads)) for name, reads in pending.items()}


def _cuda_clock(run: Callable[[], Any]) -> Callable[[], float]:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    return lambda: start.elapsed_time(stop)


def _host_clock(run: Callable[[], Any]) -> Callable[[], float]:
    start = time.perf_counter()
    run()
    elapsed = 1e3 * (time.perf_counter() - start)
    return lambda: elapsed


def environment(device: torch.device | str) -> dict[str, Any]:
    """What a figure depends on: device, driver-side versions, package versions."""
    record: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    record["dit-sparse"] = dit_sparse.__version__  # known in a bare checkout too
    for package in ("triton", "diffusers", "transformers"):
        try:
            record[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            record[package] = None
    device = torch.device(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    else:
        record |= {"device": platform.processor() or platform.machine()}
    return record
