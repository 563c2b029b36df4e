"""Puts the lines of an evaluation together: one row for each variant, and what to turn on."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any

import numpy as np

from dit_sparse.evaluation.quality import means_and_worst, metrics_of, set_distances
from dit_sparse.evaluation.runner import failures, timed_warm
from dit_sparse.evaluation.speed_model import SpeedModel, speed_model
from dit_sparse.evaluation.store import Line, Store, Task
from dit_sparse.evaluation.variants import BASELINES

_PARTS = ("encode", "denoise", "decode", "total")


@dataclass(frozen=True)
class Row:
    """A variant over all its clips.

    Args:
        label, command: its name, and the words that run the same; none for stock processors with
            another backend.
        clips: how many there are.
        failed: why it stopped, if it did.
        times: how many its seconds are medians of; 0 if only a first run, which tunes and
            compiles, was timed.
        part: of a merged folder, whose times they are; baselines are those of the same part.
        seconds: medians of the parts of a generation and of a step.
        spread: half the distance between the quartiles of denoising, relative to its median.
        density: measured, over all self-attention calls.
        peak_bytes: most memory that tensors took on the GPU.
        quality: means over clips; `None` where all clips are identical.
        worst: the worst clip's, for PSNR and SSIM.
        identical: clips that equal the dense ones.
        layers: measured density of each layer's sparse calls.
        speedup, speedup_total: of denoising and of the whole call over the fastest dense variant;
            `None` where only one of the two was timed beyond a first run.
        model_of_speed: what the speed should be; `None` where attention was not timed.
    """

    label: str
    command: tuple[str, ...]
    clips: int
    failed: str | None
    times: int
    part: int
    seconds: Mapping[str, float]
    spread: float
    density: float
    peak_bytes: int | None
    quality: Mapping[str, float | None]
    worst: Mapping[str, float]
    identical: int
    layers: tuple[float | None, ...]
    speedup: float | None = None
    speedup_total: float | None = None
    model_of_speed: SpeedModel | None = None

    @property
    def is_baseline(self) -> bool:
        return self.label in BASELINES

    @property
    def psnr(self) -> float | None:
        """Mean over clips in dB; infinite where all are identical, `None` where not measured."""
        mean = self.quality.get("psnr")
        return math.inf if mean is None and self.identical else mean

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {k: v for k, v in vars(self).items() if k != "model_of_speed"}
        found = self.model_of_speed
        return plain | {"model_of_speed": None if found is None else found.to_dict()}


@dataclass(frozen=True)
class Summary:
    """All variants of a folder.

    Args:
        settings: what they have in common.
        rows: one for each, in the order of their first run.
        gaps: metrics that were not computed, and why.
        calls: lines about single attention calls.
        baseline: the fastest dense variant, or those of the parts of a merged folder.
        target: PSNR in dB that a recommendation must reach.
        prompts, seeds: what the clips are of.
    """

    settings: Mapping[str, Any]
    rows: tuple[Row, ...]
    gaps: Mapping[str, str]
    calls: tuple[Line, ...]
    baseline: str | None
    target: float
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def measured(self) -> tuple[Row, ...]:
        """Sparse variants with a PSNR and a speedup, of which no clip failed."""
        sparse = [r for r in self.rows if not r.is_baseline and r.failed is None]
        return tuple(r for r in sparse if r.psnr and r.speedup)

    @property
    def front(self) -> tuple[Row, ...]:
        """Sparse variants that no other beats in both PSNR and speed, the fastest first."""
        best, found = float("-inf"), []
        for row in sorted(self.measured, key=lambda r: (-(r.speedup or 0), -(r.psnr or 0))):
            if (row.psnr or 0) > best:
                best = row.psnr or 0
                found.append(row)
        return tuple(found)

    @property
    def best(self) -> Row | None:
        """The fastest variant that is faster than dense and good enough."""
        good = [r for r in self.measured if (r.psnr or 0) >= self.target and (r.speedup or 0) > 1]
        return max(good, key=lambda r: r.speedup or 0, default=None)

    @property
    def recommendation(self) -> str:
        """What to turn on, in a sentence."""
        best = self.best
        if best is not None:
            return (
                f"Turn on {best.label}: {best.speedup:.2f}x faster denoising than the fastest "
                f"dense attention, at {decibel(best.psnr)} against it."
            )
        faster = [r for r in self.measured if (r.speedup or 0) > 1]
        if not self.measured:
            return "Nothing to recommend: no sparse variant has a PSNR and a time yet."
        if not faster:
            return "Leave attention dense: no variant was faster than the fastest dense one."
        near = max(faster, key=lambda r: r.psnr or 0)
        return (
            f"Leave attention dense: no faster variant reaches {self.target:g} dB PSNR; "
            f"{near.label} comes nearest with {decibel(near.psnr)} at {near.speedup:.2f}x."
        )

    @property
    def command(self) -> str | None:
        """The command of the recommendation."""
        return None if self.best is None else shlex.join(self.best.command)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {k: v for k, v in vars(self).items() if k not in ("rows", "calls")}
        return plain | {
            "recommendation": self.recommendation,
            "command": self.command,
            "rows": [row.to_dict() for row in self.rows],
        }

    def __str__(self) -> str:
        lines = [f"{'variant':<44} density  speedup    PSNR   clips"]
        for row in self.rows:
            psnr = "same" if row.psnr == math.inf else _number(row.psnr, ".2f")
            density = _number(row.density if row.clips else None, ".3f")
            lines.append(
                f"{row.label:<44} {density:>7}  {_number(row.speedup, '.2f'):>6}x "
                f"{psnr:>7}   {row.clips:>5}"
            )
        lines += [f"failed: {label}: {why}" for label, why in self.failed.items()]
        lines += [f"no {name}: {why}" for name, why in self.gaps.items()]
        lines.append(self.recommendation)
        return "\n".join([*lines, *filter(None, [self.command])])


def summarise(store: Store, target: float) -> Summary:
    """Everything in a folder, whichever calls it comes from."""
    lines = store.lines()
    made = [line for line in lines if line["kind"] in ("clip", "repeat")]
    failed = failures(lines)
    rows = [
        _row(store, label, [line for line in made if line["variant"] == label], failed, lines)
        for label in dict.fromkeys(line["variant"] for line in made)
    ]
    baselines = _baselines(made)
    timings = {(_part(li), li["variant"]): li for li in lines if li["kind"] == "time"}
    records = {line["variant"]: line["record"] for line in made if line.get("record")}
    gaps: dict[str, str] = {}
    for line in {_part(li): li for li in lines if li["kind"] == "gaps"}.values():
        gaps |= line["gaps"]
    for line in lines:
        if line["kind"] in ("call", "time") and "failed" in line:
            gaps = {**gaps, f"attention calls of {line['variant']}": line["failed"]}
        if line["kind"] == "repeat" and line["status"] == "failed":
            gaps = {**gaps, f"a further time of {line['variant']}": line["error"]}
    return Summary(
        settings=store.settings() or {},
        rows=tuple(_compared(row, baselines.get(row.part), timings, records) for row in rows),
        gaps=gaps,
        calls=tuple(line for line in lines if line["kind"] == "call"),
        baseline=" or ".join(dict.fromkeys(b.label for b in baselines.values())) or None,
        target=target,
        prompts=tuple(dict.fromkeys(line["prompt"] for line in made)),
        seeds=tuple(dict.fromkeys(line["seed"] for line in made)),
        failed=failed,
    )


def decibel(psnr: float | None) -> str:
    """A PSNR in words."""
    if psnr is None:
        return "an unknown PSNR"
    return "identical clips" if psnr == math.inf else f"{psnr:.1f} dB PSNR"


def _row(
    store: Store, label: str, own: Sequence[Line], failed: Mapping[str, str], lines: Sequence[Line]
) -> Row:
    well = [line for line in own if line["status"] == "ok"]
    timed = _timed(label, well)
    numbers = {t: m for (name, t), m in metrics_of(lines).items() if name == label}
    quality, worst = means_and_worst(list(numbers.values()))
    quality |= set_distances(store, label, list(numbers))
    records = [line["record"] for line in well if line.get("record")]
    peaks = [line["peak_bytes"] for line in well if line.get("peak_bytes")]
    return Row(
        label=label,
        command=tuple(own[0]["command"]),
        clips=len({Task(li["prompt"], li["seed"]) for li in well if li["kind"] == "clip"}),
        failed=failed.get(label),
        times=timed.times,
        part=timed.part,
        seconds=timed.seconds,
        spread=timed.spread,
        density=fmean(line["density"] for line in well) if well else 1.0,
        peak_bytes=max(peaks, default=None),
        quality=quality,
        worst=worst,
        identical=sum(bool(m.get("identical")) for m in numbers.values()),
        layers=tuple(row["density"] for row in records[-1]["layers"]) if records else (),
    )


@dataclass(frozen=True)
class _Timed:
    """Times of a variant in one part of a merged folder; see `Row`."""

    label: str
    part: int
    times: int
    seconds: Mapping[str, float]
    spread: float

    @property
    def rank(self) -> tuple[bool, float]:
        # First runs compile: those of dense variants must not flatter warm runs of sparse ones.
        return (not self.times, self.seconds["denoise"])


def _part(line: Mapping[str, Any]) -> int:
    return line.get("part", 0)


def _timed(label: str, well: Sequence[Line]) -> _Timed:
    """The times of the part with most warm ones; parts may have run on different devices."""
    parts = sorted({_part(line) for line in well}) or [0]
    warm = {p: [li for li in well if _part(li) == p and timed_warm(li)] for p in parts}
    part = max(parts, key=lambda p: (len(warm[p]), -p))
    spread = _spread([line["seconds"]["denoise"] for line in warm[part]])
    cold = [line for line in well if _part(line) == part]
    return _Timed(label, part, len(warm[part]), _seconds(warm[part] or cold), spread)


def _baselines(made: Sequence[Line]) -> dict[int, _Timed]:
    """The fastest dense variant of each part."""
    found: dict[tuple[int, str], list[Line]] = {}
    for line in made:
        if line["variant"] in BASELINES and line["status"] == "ok":
            found.setdefault((_part(line), line["variant"]), []).append(line)
    best: dict[int, _Timed] = {}
    for (part, label), lines in found.items():
        timed = _timed(label, lines)
        if part not in best or timed.rank < best[part].rank:
            best[part] = timed
    return best


def _seconds(lines: Sequence[Line]) -> dict[str, float]:
    if not lines:
        return {}
    found = {part: median(line["seconds"][part] for line in lines) for part in _PARTS}
    found["step"] = median(line["seconds"]["denoise"] / line["steps"] for line in lines)
    return found


def _spread(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, high = np.quantile(values, [0.25, 0.75])
    return float((high - low) / 2 / median(values))


def _compared(
    row: Row,
    baseline: _Timed | None,
    timings: Mapping[tuple[int, str], Line],
    records: Mapping[str, Mapping[str, Any]],
) -> Row:
    if baseline is None or not row.seconds or bool(row.times) != bool(baseline.times):
        return row
    dense, own = baseline.seconds["denoise"], row.seconds["denoise"]
    calls = {label: line for (part, label), line in timings.items() if part == row.part}
    return replace(
        row,
        speedup=dense / own,
        speedup_total=baseline.seconds["total"] / row.seconds["total"],
        model_of_speed=speed_model(row.label, row.density, own, dense, calls, records),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
