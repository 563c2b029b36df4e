"""When a method applies: dense steps, dense layers, a minimum length, other methods per layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_sparse.method import CallContext, PlanScope, SparseMethod
from dit_sparse.plan import BlockPlan


@dataclass(frozen=True)
class Schedule:
    """Wraps any method and keeps some calls dense.

    Published methods keep the first steps dense, where the layout of the picture is decided; of
    all settings this one matters most for quality (`docs/schedule.md`).

    Args:
        method: what runs in all other calls.
        dense_first: dense steps at the start, a count (int) or a fraction of all steps (float).
        dense_last: dense steps at the end, likewise.
        dense_layers: layers that are always dense; negative numbers count from the end.
        min_tokens: sequences shorter than this are dense.
        layers: pairs of a layer number and the method that runs there instead.
    """

    method: SparseMethod
    dense_first: int | float = 0
    dense_last: int | float = 0
    dense_layers: tuple[int, ...] = ()
    min_tokens: int = 0
    layers: tuple[tuple[int, SparseMethod], ...] = ()

    name: ClassVar[str] = "schedule"

    def __post_init__(self) -> None:
        for field in ("dense_first", "dense_last"):
            value = getattr(self, field)
            fraction = isinstance(value, float)
            if not (0.0 <= value <= 1.0 if fraction else value >= 0):
                raise ValueError(
                    f"Expected {field} to be a count of steps (an integer of at least 0) or a "
                    f"fraction between 0.0 and 1.0, got {value!r}."
                )
        if self.min_tokens < 0:
            raise ValueError(f"Expected min_tokens of at least 0, got {self.min_tokens}.")

    @property
    def scope(self) -> PlanScope:
        """The narrowest scope of the methods inside."""
        scopes = {m.scope for m in (self.method, *(m for _, m in self.layers))}
        if "call" in scopes:
            return "call"
        return "layer" if self.layers or "layer" in scopes else "layout"

    def dense_reason(self, ctx: CallContext) -> str | None:
        if ctx.layout.length < self.min_tokens:
            return f"{ctx.layout.length} tokens are fewer than min_tokens={self.min_tokens}"
        if ctx.layer in {n % ctx.layers for n in self._layers_of(ctx)}:
            return "dense_layers"
        return self._dense_step(ctx) or self._at(ctx).dense_reason(ctx)

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        return self._at(ctx).plan(q, k, ctx)

    def _at(self, ctx: CallContext) -> SparseMethod:
        for layer, method in self.layers:
            if layer % ctx.layers == ctx.layer:
                return method
        return self.method

    def _layers_of(self, ctx: CallContext) -> tuple[int, ...]:
        for layer in (*self.dense_layers, *(n for n, _ in self.layers)):
            if not -ctx.layers <= layer < ctx.layers:
                raise ValueError(
                    f"Expected layer numbers from {-ctx.layers} to {ctx.layers - 1}, got {layer}."
                )
        return self.dense_layers

    def _dense_step(self, ctx: CallContext) -> str | None:
        if not self.dense_first and not self.dense_last:
            return None
        if ctx.step is None:
            raise ValueError(
                "Expected to know the denoising step for dense_first or dense_last, got a forward "
                "outside a pipeline. Apply the method to the pipeline, or pass steps=."
            )
        if ctx.step < self._count(self.dense_first, "dense_first", ctx):
            return f"dense_first={self.dense_first}"
        if self.dense_last:
            if ctx.steps is None:
                raise ValueError(self._unknown_total("dense_last"))
            if ctx.step >= ctx.steps - self._count(self.dense_last, "dense_last", ctx):
                return f"dense_last={self.dense_last}"
        return None

    def _count(self, value: int | float, field: str, ctx: CallContext) -> int:
        if isinstance(value, int):
            return value
        if ctx.steps is None:
            raise ValueError(self._unknown_total(field))
        return math.ceil(round(value * ctx.steps, 6))  # 0.28 * 25 is a little more than 7

    @staticmethod
    def _unknown_total(field: str) -> str:
        return (
            f"Expected to know the number of denoising steps for {field}, got a forward outside a "
            "pipeline. Apply the method to the pipeline, or pass steps=."
        )
