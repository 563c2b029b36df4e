"""What a generation should take, from attention calls that were timed apart.

Printed beside the measurement, so that a surprise is seen: denoising without attention stays what
it is, every dense call takes what dense attention takes, every sparse one what its kernel takes,
and every plan that is made what planning takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class SpeedModel:
    """Expectations for a variant.

    Args:
        attention_share: share of dense self-attention in the fastest dense denoising.
        ideal: speedup of a kernel with the rate of dense attention and free planning, at the
            measured density.
        dense_ms: of one dense call.
        teraflop: of its self-attention in a generation, counted from the measured density.
        predicted: speedup from the kernel's and the plan's own times; this and all below are `None`
            where those were not taken.
        kernel_efficiency: rate of the kernel on what it computes over that of dense attention.
        kernel_ms, plan_ms: of one call.
        plan_share: share of planning in the variant's own denoising.
    """

    attention_share: float
    ideal: float
    dense_ms: float
    teraflop: float
    predicted: float | None = None
    kernel_efficiency: float | None = None
    kernel_ms: float | None = None
    plan_ms: float | None = None
    plan_share: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def speed_model(
    label: str,
    density: float,
    denoise: float,
    dense_denoise: float,
    timings: Mapping[str, Mapping[str, Any]],
    records: Mapping[str, Mapping[str, Any]],
) -> SpeedModel | None:
    """The model of a variant, `None` where attention was not timed.

    Args:
        label: of the variant.
        density: measured over all its calls.
        denoise, dense_denoise: seconds of its denoising and of the fastest dense one.
        timings: lines of kind "time" by variant; `""` is dense attention.
        records: what ran, by variant.
    """
    dense = timings.get("")
    if dense is None or not records:
        return None
    of_any = next(iter(records.values()))
    calls = of_any["sparse"] + of_any["dense"]
    dense_ms = dense["dense_ms"]
    attention = min(calls * dense_ms / 1e3, dense_denoise)  # timed apart, it may exceed the whole
    rest = dense_denoise - attention
    batch, heads, tokens, dim = dense["shape"]
    flop = 4 * batch * heads * tokens**2 * dim * calls * density
    ideal = dense_denoise / (rest + density * attention)
    known = SpeedModel(
        attention_share=attention / dense_denoise,
        ideal=ideal,
        dense_ms=dense_ms,
        teraflop=flop / 1e12,
    )
    timed, record = timings.get(label), records.get(label)
    if timed is None or record is None or "kernel_ms" not in timed:
        return known
    plans = record["sparse"] - record["reused"]
    planning = plans * timed["plan_ms"] / 1e3
    kernels = record["sparse"] * timed["kernel_ms"] / 1e3 + record["dense"] * dense_ms / 1e3
    return replace(
        known,
        predicted=dense_denoise / (rest + kernels + planning),
        kernel_efficiency=timed["density"] * dense_ms / timed["kernel_ms"],
        kernel_ms=timed["kernel_ms"],
        plan_ms=timed["plan_ms"],
        plan_share=planning / denoise,
    )
