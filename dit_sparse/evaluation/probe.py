"""What variants do to single attention calls of a dense run: error, kept mass and time.

All variants look at the same q, k and v, so that their numbers can be put beside each other; what
an error does to later layers and steps shows in the clips.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.attention import attend, dense_attention
from dit_sparse.attention_map import block_statistics
from dit_sparse.backend import Precision
from dit_sparse.bench import time_interleaved
from dit_sparse.commands.models import Model
from dit_sparse.evaluation.variants import Variant
from dit_sparse.method import CallContext, PlanScope, SparseMethod
from dit_sparse.methods.schedule import Schedule
from dit_sparse.methods.window import WindowMethod
from dit_sparse.pipelines.apply import apply, remove, summary
from dit_sparse.plan import BlockPlan

MAP_SIDE = 128  # blocks a side of a map that is kept

_ROUNDS = 5
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class CallProbe:
    """A method that compares the plans of others with dense attention, and changes nothing.

    A chosen call runs a plan that reads every key; all others are dense. Of the forwards of a step
    the first is looked at, which is the prompt's where guidance takes two.

    Args:
        methods: what to look at, by label.
        steps: numbers of the denoising steps.
        precisions: what methods multiply in, by label, where it is not the dtype of the model.
        lines: what was found: one for each method, layer and step, and one with times.
    """

    methods: Mapping[str, SparseMethod]
    steps: frozenset[int]
    precisions: Mapping[str, Precision] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    seen: set[tuple[int, int]] = field(default_factory=set)

    name: ClassVar[str] = "call probe"
    scope: ClassVar[PlanScope] = "call"

    def dense_reason(self, ctx: CallContext) -> str | None:
        known = ctx.step is None or (ctx.layer, ctx.step) in self.seen
        return "the call is not probed" if known or ctx.step not in self.steps else None

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        assert ctx.step is not None  # dense_reason let the call through
        self.seen.add((ctx.layer, ctx.step))
        v = ctx.values
        assert v is not None  # a session always gives them
        every_key = WindowMethod(density=1.0).plan(q, k, ctx)
        dense = attend(q, k, v, every_key)
        for label, method in self.methods.items():
            if method.dense_reason(ctx) is not None:
                continue
            self.lines.append(self._compare(label, method, (q, k, v), dense, ctx))
        return every_key

    def _compare(
        self,
        label: str,
        method: SparseMethod,
        qkv: tuple[Tensor, Tensor, Tensor],
        dense: tuple[Tensor, Tensor],
        ctx: CallContext,
    ) -> dict[str, Any]:
        place = {"variant": label, "layer": ctx.layer, "step": ctx.step, "steps": ctx.steps}
        try:
            plan = method.plan(*qkv[:2], ctx)
            precision = self.precisions.get(label, "bf16")
            out, lse = attend(*qkv, plan, precision=precision)
            if plan.tail != "none" or plan.pools is not None or plan.scale != 1.0:
                exact = replace(plan, tail="none", hidden=None, pools=None, scale=1.0)
                lse = attend(*qkv, exact).lse
            true = dense[0].float()
            of_head = (0, 2, 3)
            apart = (out.float() - true).square().sum(of_head)
            error = (apart / true.square().sum(of_head).clamp_min(_TINY)).sqrt()
            kept = (lse - dense[1]).exp().clamp(max=1.0).mean((0, 2))
            if not (error.isfinite() & kept.isfinite()).all():
                raise ValueError("Expected finite outputs and LSEs of the call, got others.")
            return place | {
                "kind": "call",
                "density": plan.density,
                "error": _rounded(error),
                "kept": _rounded(kept),
            }
        except (ValueError, RuntimeError) as error:  # the others go on
            return place | {"kind": "call", "failed": " ".join(str(error).split())}


@dataclass(frozen=True, eq=False)
class TimeProbe:
    """A method that times plans and kernels of others on the q, k and v of one call.

    Args:
        methods: what to time, by label.
        step: number of the denoising step.
        layer: number of the layer.
        precisions: as for `CallProbe`.
        lines: what was found.
        maps: `block_maps` of the same call, by label.
    """

    methods: Mapping[str, SparseMethod]
    step: int
    layer: int
    precisions: Mapping[str, Precision] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    maps: dict[str, np.ndarray] = field(default_factory=dict)

    name: ClassVar[str] = "time probe"
    scope: ClassVar[PlanScope] = "call"

    def dense_reason(self, ctx: CallContext) -> str | None:
        chosen = (ctx.layer, ctx.step) == (self.layer, self.step) and not self.lines
        return None if chosen else "the call is not timed"

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        v = ctx.values
        assert v is not None  # a session always gives them
        runs: dict[str, Any] = {"": lambda: dense_attention(q, k, v, layout=ctx.layout)}
        found: dict[str, dict[str, Any]] = {}
        for label, method in self.methods.items():
            inner = method.at(ctx) if isinstance(method, Schedule) else method
            try:
                begin = time.perf_counter()
                plan = inner.plan(q, k, ctx)
                density = plan.density  # waits for the device
                first = 1e3 * (time.perf_counter() - begin)
                precision = self.precisions.get(label, "bf16")
                attend(q, k, v, plan, precision=precision)
            except (ValueError, RuntimeError) as error:
                self.lines.append(_failed(label, error))
                continue
            self.maps[label] = block_maps(q, k, plan)
            found[label] = {"density": density, "first_plan_ms": first}
            runs[f"kernel {label}"] = _attending(q, k, v, plan, precision)
            runs[f"plan {label}"] = _planning(inner, q, k, ctx)
        times = time_interleaved(runs, q.device, rounds=_ROUNDS, warmup=1)
        shape = [q.shape[0], q.shape[1], q.shape[2], q.shape[3]]
        common = {"kind": "time", "shape": shape, "dense_ms": times[""].median}
        self.lines.append({**common, "variant": ""})
        for label, known in found.items():
            measured = {
                "kernel_ms": times[f"kernel {label}"].median,
                "plan_ms": times[f"plan {label}"].median,
            }
            self.lines.append({**common, "variant": label, **known, **measured})
        return WindowMethod(density=1.0).plan(q, k, ctx)


def probe(
    model: Model,
    variants: Sequence[Variant],
    call: Mapping[str, Any],
    seed: int,
    shares: Sequence[float],
    steps: int,
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Runs the pipeline densely twice, once to compare calls and once to time one.

    Args:
        variants: those without a method are left out.
        call, seed: what to generate.
        shares: where in the schedule to look; the middle one is timed.
        steps: of the schedule.

    Returns:
        Lines of kind "call", with an error and a kept share of the softmax mass for each head, and
        of kind "time", in milliseconds; and the `block_maps` of the call that was timed.
    """
    methods = {v.label: v.method for v in variants if v.method is not None and not v.is_baseline}
    precisions = {v.label: v.precision for v in variants}
    at = sorted({round(share * (steps - 1)) for share in shares})
    if not methods or not at:
        return [], {}
    calls = CallProbe(methods, frozenset(at), precisions)
    layers = len(_run(model, calls, call, seed))
    times = TimeProbe(methods, at[len(at) // 2], layers // 2, precisions)
    _run(model, times, call, seed)
    return [*calls.lines, *times.lines], times.maps


def block_maps(q: Tensor, k: Tensor, plan: BlockPlan) -> np.ndarray:
    """Where the softmax mass of a few heads lies, and which blocks a plan reads.

    Args:
        q, k: `[B, H, N, D]` in the caller's order; the first batch entry is looked at.
        plan: of the call.

    Returns:
        float16 `[heads, 2, n_q, n_k]` in plan order, larger ones pooled to `MAP_SIDE`: the mean
        mass that a query of a block row puts into a block; and 1 for blocks that are read exactly,
        1/2 for those read by means of their keys.
    """
    if plan.order is not None:
        q, k = plan.order(q), plan.order(k)
    heads = sorted({round(at * (q.shape[1] - 1)) for at in (0.0, 0.5, 1.0)})
    group = q.shape[1] // k.shape[1]
    keys = k[0, [head // group for head in heads]]
    found = block_statistics(q[0, heads], keys, plan.k_blocks, 0.0)
    mass = found.sums / plan.q_blocks.lengths[:, None]
    exact = plan.listed("full") | plan.listed("partial")
    level = exact[0].float().maximum(plan.listed("pooled")[0] / 2)
    read = level.expand(q.shape[1], -1, -1)[heads].to(mass.dtype)
    side = min(MAP_SIDE, mass.shape[-1])
    pictures = torch.stack([mass, read], dim=1)
    return F.adaptive_avg_pool2d(pictures, side).half().cpu().numpy()


def _run(
    model: Model, method: CallProbe | TimeProbe, call: Mapping[str, Any], seed: int
) -> tuple[Any, ...]:
    """The layers of the first transformer."""
    apply(model.pipeline, method)
    try:
        noise = torch.Generator("cpu").manual_seed(seed)
        model.pipeline(**call, generator=noise, output_type="latent")
        rows = summary(model.pipeline).rows
    finally:
        remove(model.pipeline)
    return tuple(row for row in rows if row.transformer == rows[0].transformer)


def _attending(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, precision: Precision) -> Any:
    return lambda: attend(q, k, v, plan, precision=precision)


def _planning(method: SparseMethod, q: Tensor, k: Tensor, ctx: CallContext) -> Any:
    return lambda: method.plan(q, k, ctx)


def _failed(label: str, error: Exception) -> dict[str, Any]:
    return {"kind": "time", "variant": label, "failed": " ".join(str(error).split())}


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.double().tolist()]
