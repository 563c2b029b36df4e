"""When a method applies: dense steps, dense layers, a minimum length, other methods per layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
        if not isinstance(self.method, SparseMethod):
            raise ValueError(
                f"Expected a method, got {self.method!r}. Make one of a name with "
                "dit_sparse.methods.create()."
            )
        for field in ("dense_first", "dense_last"):
            _check_steps(field, getattr(self, field))
        if not _is_integer(self.min_tokens) or self.min_tokens < 0:
            raise ValueError(
                f"Expected an integer min_tokens of at least 0, got {self.min_tokens!r}."
            )
        object.__setattr__(self, "dense_layers", _layer_numbers(self.dense_layers))
        object.__setattr__(self, "layers", _layer_methods(self.layers))

    @property
    def scope(self) -> PlanScope:
        """The narrowest scope of the methods inside."""
        scopes = {m.scope for m in (self.method, *(m for _, m in self.layers))}
        for narrow in ("call", "segment"):
            if narrow in scopes:
                return narrow
        return "layer" if self.layers or "layer" in scopes else "layout"

    def at(self, ctx: CallContext) -> SparseMethod:
        """The method that plans the calls of a layer: never a schedule."""
        method = self._at(ctx)
        return method.at(ctx) if isinstance(method, Schedule) else method

    def check_layers(self, count: int) -> None:
        """Refuses settings that do not fit a transformer with this many attention layers.

        Raises:
            ValueError: a layer that it does not have, or two methods for one layer.
        """
        for layer in (*self.dense_layers, *(n for n, _ in self.layers)):
            if not -count <= layer < count:
                raise ValueError(
                    f"Expected layer numbers from {-count} to {count - 1}, got {layer}."
                )
        seen: dict[int, int] = {}
        for layer, _ in self.layers:
            if layer % count in seen:
                raise ValueError(
                    f"Expected one method per layer, got {seen[layer % count]} and {layer} for "
                    f"the same of {count} layers."
                )
            seen[layer % count] = layer
        for method in (self.method, *(m for _, m in self.layers)):
            if isinstance(method, Schedule):
                method.check_layers(count)

    def dense_reason(self, ctx: CallContext) -> str | None:
        if ctx.layout.length < self.min_tokens:
            return f"{ctx.layout.length} tokens are fewer than min_tokens={self.min_tokens}"
        if any(n % ctx.layers == ctx.layer for n in self.dense_layers):
            return "dense_layers"
        return self._dense_step(ctx) or self._at(ctx).dense_reason(ctx)

    def always_dense(self, ctx: CallContext) -> bool:
        """Whether the calls of a layer are dense whatever the step, which is not looked at."""
        if ctx.layout.length < self.min_tokens:
            return True
        if any(n % ctx.layers == ctx.layer for n in self.dense_layers):
            return True
        method = self._at(ctx)
        return isinstance(method, Schedule) and method.always_dense(ctx)

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        return self.at(ctx).plan(q, k, ctx)

    def _at(self, ctx: CallContext) -> SparseMethod:
        for layer, method in self.layers:
            if layer % ctx.layers == ctx.layer:
                return method
        return self.method

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


def parts(method: SparseMethod) -> Iterator[SparseMethod]:
    """The methods that a schedule chooses among, or the method itself."""
    if not isinstance(method, Schedule):
        yield method
        return
    for inner in (method.method, *(inner for _, inner in method.layers)):
        yield from parts(inner)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_steps(field: str, value: object) -> None:
    count = _is_integer(value) and value >= 0  # type: ignore[operator]
    if not count and not (isinstance(value, float) and 0.0 <= value <= 1.0):
        raise ValueError(
            f"Expected {field} to be a count of steps (an integer of at least 0) or a "
            f"fraction between 0.0 and 1.0, got {value!r}."
        )


def _layer_numbers(value: object) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list, range)) or not all(map(_is_integer, value)):
        raise ValueError(
            f"Expected dense_layers to be layer numbers, such as (0, 1, -1), got {value!r}."
        )
    return tuple(value)


def _layer_methods(value: object) -> tuple[tuple[int, SparseMethod], ...]:
    if not isinstance(value, (tuple, list)) or not all(map(_is_layer_method, value)):
        raise ValueError(
            f"Expected layers to be pairs of a layer number and a method, got {value!r}."
        )
    return tuple((layer, method) for layer, method in value)


def _is_layer_method(pair: object) -> bool:
    shaped = isinstance(pair, (tuple, list)) and len(pair) == 2
    return shaped and _is_integer(pair[0]) and isinstance(pair[1], SparseMethod)  # type: ignore[index]
