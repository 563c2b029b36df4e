"""Times of one transformer at one or two depths, and the rows that they make."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import dit_sparse
from dit_sparse.attention import dense_attention
from dit_sparse.bench import time_interleaved
from dit_sparse.pipelines.compile import compile_blocks
from scripts.step_models import Model
from scripts.supervision import Progress

#: Stock processors, and this package's dense path.
DENSE = ("stock", "dense")

#: From a variant's name and a number of units to its method; `None` is the stock processors.
Choose = Callable[[str, int], Any]


@dataclass
class Run:
    """Times of one variant in milliseconds.

    Args:
        times: of a step, one for each round.
        deepest: of the deepest forward that was timed, likewise.
        first: the host's time of a forward that plans, and the device's of the next one.
        density: measured.
        failure: why there are no times.
    """

    times: list[float] = field(default_factory=list)
    deepest: list[float] = field(default_factory=list)
    first: tuple[float, float] = (0.0, 0.0)
    density: float = 1.0
    failure: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    def check(self, estimated: bool) -> None:
        """Fails if the time of all layers was estimated from depths too near to each other."""
        if estimated and self.times and self.median <= statistics.median(self.deepest):
            self.failure = (
                f"Expected all layers to take longer than a few, got an estimate of "
                f"{self.median:.1f} ms. Give more --units."
            )
            self.times = []

    def record(self, share: float, fastest: float) -> dict[str, Any]:
        """Its part of a row, with what the measured density allows at best."""
        speedup, ideal = fastest / self.median, 1 / (1 - share * (1 - self.density))
        spread = (max(self.times) - min(self.times)) / 2 / self.median
        return {
            "measured_density": round(self.density, 4),
            "ms": round(self.median, 2),
            "rounds": len(self.times),
            "spread": round(spread, 4),
            "plan_ms": round(max(0.0, self.first[0] - self.first[1]), 2),
            "speedup": round(speedup, 3),
            "ideal": round(ideal, 3),
            "of_ideal": round(speedup / ideal, 3),
        }


@dataclass(frozen=True, eq=False)
class Bench:
    """A transformer that was built, ready to be timed at some depths.

    Args:
        model: its configuration.
        depths: one number of units, or two through whose times a line is drawn.
        transformer, inputs: built with the largest of them.
        device: of both.
    """

    model: Model
    depths: tuple[int, ...]
    transformer: nn.Module
    inputs: Mapping[str, Any]
    device: torch.device

    @classmethod
    def build(cls, model: Model, units: int, device: torch.device) -> Bench:
        """Random bf16 weights; index tensors of the inputs keep their dtype.

        Args:
            model: what to build.
            units: of the deeper of two depths; the model's own number or 0 builds it whole.
            device: where.
        """
        whole = units in (0, model.units)
        depths = (model.units,) if whole else (max(1, units // 2), units)
        if not whole and not 2 <= units < model.units:
            raise ValueError(f"Expected --units from 2 to {model.units}, or 0, got {units}.")
        torch.set_default_dtype(torch.bfloat16)
        try:
            with device:
                transformer, inputs = model.build(max(depths)).eval(), model.inputs()
        finally:
            torch.set_default_dtype(torch.float32)
        return cls(model, depths, transformer, inputs, device)

    def compile(self) -> None:
        """Compiles the blocks; other models' sizes are forgotten, or they would become dynamic."""
        torch._dynamo.reset()
        compile_blocks(self.transformer)

    def attention_ms(self) -> float:
        """Time of all dense self-attention of a step, measured apart."""
        model = self.model
        shape = (1, model.tokens, model.heads, model.head_dim)
        q, k, v = (torch.randn(shape, device=self.device, dtype=torch.bfloat16) for _ in range(3))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        run = {"dense": lambda: dense_attention(q, k, v)}
        found = time_interleaved(run, self.device, rounds=3, warmup=1)
        return model.layers(model.units) * found["dense"].median

    def time(
        self,
        wanted: Sequence[str],
        choose: Choose,
        rounds: int,
        seconds: float,
        progress: Progress,
    ) -> dict[str, Run]:
        """Times variants in turn, in an order drawn anew in every round: what runs before a variant
        changes clocks and caches. One that fails leaves the others.

        Args:
            wanted: names, the dense ones first.
            choose: their methods.
            rounds: beside a first one, which compiles.
            seconds: after which no further round begins, if all were timed once.
            progress: told of every forward.
        """
        runs = {variant: Run() for variant in wanted}
        lists = {name: getattr(self.transformer, name) for name in self.model.stacks}
        begin, order, draw = time.monotonic(), list(runs), random.Random(0)
        try:
            for turn in range(rounds + 1):
                if turn > 1 and time.monotonic() - begin > seconds:
                    break
                for variant in order:
                    if runs[variant].failure is None:
                        progress.tell(variant)
                        self._turn(variant, runs[variant], choose, lists, timed=turn > 0)
                draw.shuffle(order)
        finally:
            dit_sparse.remove(self.transformer)
            self.model.cut(self.transformer, lists, max(self.depths))
        for run in runs.values():
            run.check(len(self.depths) > 1)
        return runs

    def _turn(
        self,
        variant: str,
        run: Run,
        choose: Choose,
        lists: Mapping[str, nn.ModuleList],
        *,
        timed: bool,
    ) -> None:
        try:
            found = [self._forwards(variant, run, choose, lists, units) for units in self.depths]
            if timed:
                run.times.append(on_line(self.depths, found, self.model.units))
                run.deepest.append(found[-1])
        except (RuntimeError, ValueError, NotImplementedError) as error:
            run.times, run.failure = [], " ".join(str(error).split()) or repr(error)
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # raises if nothing can run here any more
                torch.cuda.empty_cache()

    def _forwards(
        self,
        variant: str,
        run: Run,
        choose: Choose,
        lists: Mapping[str, nn.ModuleList],
        units: int,
    ) -> float:
        """Milliseconds of a forward at this depth, whose plans are there."""
        dit_sparse.remove(self.transformer)
        self.model.cut(self.transformer, lists, units)
        method = choose(variant, units)
        if method is None:
            return self._forward()
        dit_sparse.apply(self.transformer, method, steps=1)
        if variant in DENSE:
            return self._forward()
        start = time.perf_counter()
        self._forward()
        planned = 1e3 * (time.perf_counter() - start)
        again = self._forward()
        run.first = (planned, again)
        run.density = dit_sparse.summary(self.transformer).density or 1.0
        return again

    def _forward(self) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            self.transformer(**self.inputs)
            return 1e3 * (time.perf_counter() - start)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        self.transformer(**self.inputs)
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last)


def on_line(depths: Sequence[int], times: Sequence[float], units: int) -> float:
    """The time at `units`, on the line through the times of two depths; the time of one alone."""
    if len(depths) == 1:
        return times[0]
    slope = (times[1] - times[0]) / (depths[1] - depths[0])
    return times[0] + slope * (units - depths[0])


def rows(bench: Bench, runs: Mapping[str, Run], attention: float) -> Iterator[dict[str, Any]]:
    """A row for each variant; without any dense time, all have failed."""
    model = bench.model
    dense = [runs[v].median for v in DENSE if v in runs and runs[v].times]
    fastest = min(dense, default=None)
    common = {
        "tokens": model.tokens,
        "layers": model.layers(model.units),
        "timed_layers": [model.layers(units) for units in bench.depths],
        "estimated": len(bench.depths) > 1,
    }
    for variant, run in runs.items():
        if fastest is None or not run.times:
            why = run.failure or "no dense variant ran, and nothing can be compared"
            yield {"variant": variant, **common, "failed": why}
            continue
        share = min(1.0, attention / fastest)
        measured = run.record(share, fastest)
        yield {"variant": variant, **common, "attention_share": round(share, 3), **measured}
