"""Fixtures for pipeline tests: tiny pipelines, and a probe that watches their attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_sparse.grid import TokenLayout
from dit_sparse.method import CallContext, SparseMethod
from dit_sparse.pipelines.family import family_of
from dit_sparse.pipelines.tiny import tiny_pipeline


@dataclass
class Forward:
    """One forward of a transformer: its bound arguments and the attention calls of its family."""

    arguments: dict[str, Any]
    layout: TokenLayout
    calls: list[tuple[str, Tensor, Tensor | None]] = field(default_factory=list)

    @property
    def q(self) -> Tensor:
        """Queries `[B, H, N, D]` of the first self-attention call."""
        return self.calls[0][1]


class Probe:
    """Records every forward of a transformer: layout, queries and masks of its self-attention."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self.family = family_of(transformer)
        self.forwards: list[Forward] = []
        self._inside: str | None = None

    @contextmanager
    def watching(self, method: SparseMethod | None = None) -> Iterator[list[Forward]]:
        """Records; with a method, self-attention gets the mask of its plan in place of its own."""
        self.forwards = []
        stock = torch.nn.functional.scaled_dot_product_attention
        handles = [self.transformer.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for name, module in self.transformer.named_modules():
            if self.family.attends(name):
                handles.append(module.register_forward_pre_hook(partial(self._enter, name)))
                handles.append(module.register_forward_hook(self._leave))

        def core(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Tensor:
            if self._inside is not None:
                mask = more.get("attn_mask")
                self.forwards[-1].calls.append((self._inside, query.clone(), mask))
                if method is not None:
                    layout = self.forwards[-1].layout
                    if query.shape[2] != layout.length:  # the image-only attention of SD 3.5
                        layout = layout.without_text()
                    plan = method.plan(query, key, CallContext(layout))
                    more = more | {"attn_mask": plan.to_mask()}
            return stock(query, key, value, *rest, **more)

        torch.nn.functional.scaled_dot_product_attention = core
        try:
            yield self.forwards
        finally:
            torch.nn.functional.scaled_dot_product_attention = stock
            for handle in handles:
                handle.remove()

    def run(self, arguments: Mapping[str, Any]) -> Forward:
        """One forward with these arguments."""
        with self.watching(), torch.no_grad():
            self.transformer(**arguments)
        return self.forwards[0]

    def changed(self, base: Forward, name: str, bump: Tensor) -> list[int]:
        """Positions whose first queries change, in any batch entry, when `bump` is added."""
        moved = base.arguments | {name: base.arguments[name] + bump}
        difference = (self.run(moved).q - base.q).abs().amax(dim=(0, 1, 3))
        return (difference > 1e-6).nonzero().flatten().tolist()

    @staticmethod
    def set_patch(video: Tensor, patch: tuple[int, int, int], at: tuple[int, int, int]) -> None:
        """Sets the patch of `[B, C, F, H, W]` under one token to 1."""
        f, r, c = (slice(i * p, (i + 1) * p) for i, p in zip(at, patch, strict=True))
        video[:, :, f, r, c] = 1.0

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        del arguments["self"]
        self.forwards.append(Forward(arguments, self.family.layout(module, arguments)))

    def _enter(self, name: str, *_: Any) -> None:
        self._inside = name

    def _leave(self, *_: Any) -> None:
        self._inside = None


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random inputs and weights are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def probe() -> Callable[[nn.Module], Probe]:
    """Makes a probe of a transformer."""
    return Probe


@pytest.fixture
def tiny() -> Callable[[str], Any]:
    """Makes a quiet tiny pipeline of a family."""

    def make(name: str) -> Any:
        pipe = tiny_pipeline(name)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make
