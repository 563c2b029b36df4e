"""Methods side by side at equal measured time: the error of attention to real q, k and v."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from dit_sparse import methods
from dit_sparse.attention import attend, dense_attention, plan_and_attend
from dit_sparse.bench import time_interleaved
from dit_sparse.method import SparseMethod
from scripts.evaluation.maps import map_head
from scripts.evaluation.probe import Capture

#: Shares of the key blocks that are read exactly, which set a method's time.
DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
#: Heads of a timed call, at least.
HEADS = 24
_TINY = 1e-12


@dataclass(frozen=True)
class Variant:
    """One method at one density.

    Args:
        name: of the curve that it is a point of.
        density: share of the key blocks that it reads exactly; a pyramid reads as many again at
            each of two levels, and twice as many at the coarsest.
    """

    name: str
    density: float

    @property
    def method(self) -> SparseMethod:
        rho = self.density
        ends = tuple(min(1.0, share * rho) for share in (1, 2, 3, 5))
        return {
            "skip only": lambda: methods.create("pisa", {"density": rho, "tail": "none"}),
            "PISA zeroth": lambda: methods.create("pisa", {"density": rho, "tail": "zeroth"}),
            "PISA first": lambda: methods.create("pisa", {"density": rho, "tail": "first"}),
            "PSA": lambda: methods.create("psa", {"ends": ends}),
            "PSA pooled skip": lambda: methods.create("psa", {"ends": ends, "skipped": "mean"}),
        }[self.name]()


NAMES = ("skip only", "PISA zeroth", "PISA first", "PSA", "PSA pooled skip")


@dataclass(frozen=True)
class Point:
    """A variant on one head of one call.

    Args:
        layer, head, step: which.
        kind: of the head, from `structure.KINDS`.
        name, density: of the variant.
        time: of planning and attending, as a share of dense attention's.
        error: relative Frobenius distance of the head's output from dense attention's.
    """

    layer: int
    head: int
    step: int
    kind: str
    name: str
    density: float
    time: float
    error: float


def variants_for(capture: Capture, densities: Sequence[float] = DENSITIES) -> list[Variant]:
    """Every method at every density that it takes on the layout of a call."""
    found = []
    for name in NAMES:
        for density in densities:
            variant = Variant(name, density)
            try:
                variant.method.plan(*capture.tensors[:2], capture.context)
            except ValueError:  # less than one block
                continue
            found.append(variant)
    return found


def measure_times(
    capture: Capture, variants: Sequence[Variant], rounds: int
) -> tuple[float, dict[Variant, float]]:
    """Milliseconds of dense attention, and of each variant's planning and attending.

    Numbers of blocks are fixed, so that times are the same for all calls of a layout. They are of
    copies of the heads, as many as large models have: with a few the device waits for the host.
    """
    copies = -(-HEADS // capture.tensors[0].shape[1])
    q, k, v = (x.repeat(1, copies, 1, 1) for x in capture.tensors)
    context = replace(capture.context, values=v)

    def run(method: SparseMethod) -> Any:
        return lambda: plan_and_attend(method, q, k, v, context)

    runs = {repr(variant): run(variant.method) for variant in variants}
    runs["dense"] = lambda: dense_attention(q, k, v, layout=context.layout)
    times = time_interleaved(runs, q.device, rounds=rounds, warmup=1)
    return times["dense"].median, {v: times[repr(v)].median for v in variants}


def points_of(
    captures: Iterable[Capture], times: Mapping[Variant, float], dense_ms: float
) -> Iterator[Point]:
    """Every variant on every head of captured calls of one layout."""
    for capture in captures:
        q, k, v = capture.tensors
        context = capture.context
        exact = dense_attention(q.float(), k.float(), v.float(), layout=context.layout)
        kinds = [map_head(capture, head).kind for head in range(len(capture.q))]
        for variant, time in times.items():
            out = attend(q, k, v, variant.method.plan(q, k, context)).out
            apart = (out.float() - exact).square().sum((0, 2, 3))
            errors = (apart / exact.square().sum((0, 2, 3)).clamp_min(_TINY)).sqrt().tolist()
            for head, (kind, error) in enumerate(zip(kinds, errors, strict=True)):
                yield Point(
                    layer=capture.layer,
                    head=head,
                    step=capture.step,
                    kind=kind,
                    name=variant.name,
                    density=variant.density,
                    time=time / dense_ms,
                    error=error,
                )


def error_at(points: Sequence[Point], time: float) -> float | None:
    """The error of one method on one head at a time, between the points around it on logarithmic
    scales; `None` outside of what was measured."""
    ranked = sorted(points, key=lambda point: point.time)
    for before, after in pairwise(ranked):
        if before.time <= time <= after.time:
            width = math.log(after.time / before.time)
            share = 0.0 if width == 0 else math.log(time / before.time) / width
            low, high = (math.log(max(point.error, _TINY)) for point in (before, after))
            return math.exp(low + share * (high - low))
    return None


@dataclass(frozen=True)
class Comparison:
    """The methods on the heads of one kind, at one time.

    Args:
        kind: of the heads, `"all"` for all of them.
        time: as a share of dense attention's.
        heads: how many heads of calls all methods have an error for.
        errors: the median of each method.
        wins: on how many of the heads a method has the least error.
    """

    kind: str
    time: float
    heads: int
    errors: dict[str, float]
    wins: dict[str, int]


def compare(points: Sequence[Point], times: Sequence[float]) -> list[Comparison]:
    """Methods at equal times, for every kind of heads and for all; a method that was not measured
    on both sides of a time is left out of it."""
    curves: dict[tuple[int, int, int], dict[str, list[Point]]]
    curves = defaultdict(lambda: defaultdict(list))
    kinds: dict[tuple[int, int, int], str] = {}
    for point in points:
        place = (point.layer, point.head, point.step)
        curves[place][point.name].append(point)
        kinds[place] = point.kind
    rows = []
    for kind in ("all", *sorted(set(kinds.values()))):
        places = [place for place in curves if kind in ("all", kinds[place])]
        for time in times:
            found = [
                {name: error_at(curve, time) for name, curve in curves[place].items()}
                for place in places
            ]
            rows.append(_compared(kind, time, found))
    return rows


def _compared(kind: str, time: float, found: Sequence[Mapping[str, float | None]]) -> Comparison:
    names = [n for n in NAMES if found and all(f.get(n) is not None for f in found)]
    errors = {n: float(torch.tensor([f[n] for f in found]).median()) for n in names}
    wins = dict.fromkeys(names, 0)
    for heads in found:
        if names:
            wins[min(names, key=lambda n: heads[n] or 0.0)] += 1
    return Comparison(kind, time, len(found) if names else 0, errors, wins)


def table(rows: Sequence[Comparison]) -> str:
    """Markdown: median errors in percent, the least in bold, and on how many heads it is least."""
    lines = [
        f"| heads | of dense time | {' | '.join(NAMES)} |",
        "|---" * (2 + len(NAMES)) + "|",
    ]
    for row in rows:
        if not row.errors:
            continue
        best = min(row.errors, key=lambda name: row.errors[name])
        cells = [_cell(row, name, name == best) for name in NAMES]
        lines.append(f"| {row.kind} ({row.heads}) | {row.time:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Comparison, name: str, best: bool) -> str:
    if name not in row.errors:
        return "-"
    text = f"{100 * row.errors[name]:.2f}"
    return f"{f'**{text}**' if best else text} ({row.wins[name]})"
