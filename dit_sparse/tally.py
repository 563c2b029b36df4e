"""What a calibration adds up while the dense model runs, and keeps when it is interrupted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_sparse import orders
from dit_sparse.attention_map import (
    MapMetrics,
    block_statistics,
    map_metrics,
    picture_sums,
    small_weight,
)
from dit_sparse.block_budget import Criterion, choose_orders
from dit_sparse.frame import Frame, frame_of
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.method import CallContext
from dit_sparse.progress_file import read_progress, write_progress

_KEY = "dit_sparse.calibration_progress"


@dataclass(frozen=True)
class Facts:
    """What all calls of a calibration have in common.

    Args:
        grid: the picture's tokens.
        text: tokens of text and reference images of the first call.
        layers, heads: of the transformer.
        steps: of a generation.
    """

    grid: TokenGrid
    text: int
    layers: int
    heads: int
    steps: int

    @classmethod
    def of(cls, q: Tensor, ctx: CallContext, known: Facts | None) -> Facts:
        """Those of a call on queries `[B, H, N, D]`, or those known if they agree.

        Raises:
            ValueError: another grid, size of the model or number of steps than known, or a forward
                outside a pipeline.
        """
        if ctx.steps is None or ctx.step is None:
            raise ValueError(
                "Expected to know the denoising steps for a calibration, got a forward outside a "
                "pipeline. Calibrate the pipeline that will run."
            )
        text = ctx.layout.length - ctx.layout.grid.length
        facts = cls(ctx.layout.grid, text, ctx.layers, q.shape[1], ctx.steps)
        if known is not None and replace(facts, text=known.text) != known:
            raise ValueError(
                f"Expected all calls of a calibration to be like the first, {known}, got {facts}. "
                "Calibrate one size and number of steps at a time."
            )
        return known or facts

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "grid": str(self.grid)}

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> Facts:
        """What `to_dict` gave."""
        return cls(**{**values, "grid": TokenGrid.parse(values["grid"])})


@dataclass(eq=False)
class Tally:
    """Sums over calls, prompt by prompt.

    Args:
        block: tokens of a block.
        facts: of the calls, once one was seen.
        metrics: by layer, fp64 `[3, orders, H]`: sums of `MapMetrics` for each candidate order.
        sums: by segment and layer, fp32 `[H, n, n]` on the CPU: sums of the maps in the chosen
            order, picture blocks alone.
        calls: maps in each of those; keys of one number are of `metrics`.
        finished: generations that are part of it.
    """

    block: int
    facts: Facts | None = None
    metrics: dict[int, Tensor] = field(default_factory=dict)
    sums: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    calls: Counter[tuple[int, ...]] = field(default_factory=Counter)
    finished: int = 0

    def candidates(self, grid: TokenGrid) -> tuple[str, ...]:
        """Axis orders that differ on a grid: six of a video, two of an image."""
        return tuple(dict.fromkeys(orders.plain_axes(grid, name) for name in orders.AXES))

    def compare_orders(self, q: Tensor, k: Tensor, ctx: CallContext) -> None:
        """Adds the metrics of a call's maps in every order.

        Args:
            q, k: `[B, H, N, D]` in the model's order.

        Raises:
            ValueError: another grid, size of the model or number of steps than before.
        """
        self._check(q, ctx)
        found = []
        for name in self.candidates(ctx.layout.grid):
            frame = frame_of(ctx.layout, self.block, name, device=q.device)
            maps = _maps(q, k, frame, ctx.layout)
            found.append(torch.stack([torch.stack(map_metrics(m, frame)).double() for m in maps]))
        added = torch.stack(found, dim=2).sum(0).cpu()  # [3, orders, H], summed over the batch
        self.metrics[ctx.layer] = self.metrics.get(ctx.layer, 0) + added
        self.calls[ctx.layer,] += q.shape[0]

    def orders(self, layer: int, criterion: Criterion) -> tuple[str, ...]:
        """The order of each head of a layer."""
        assert self.facts is not None
        names = self.candidates(self.facts.grid)
        means = MapMetrics(*(self.metrics[layer] / self.calls[layer,]))
        return tuple(names[number] for number in choose_orders(means, criterion).tolist())

    def add_maps(
        self, q: Tensor, k: Tensor, ctx: CallContext, names: tuple[str, ...], segment: int
    ) -> None:
        """Adds the block sums of a call's maps, every head in its order.

        Args:
            q, k: as for `compare_orders`, which raises the same.
            names: order of each head.
            segment: of the call's step.
        """
        self._check(q, ctx)
        key = (segment, ctx.layer)
        for name in dict.fromkeys(names):
            frame = frame_of(ctx.layout, self.block, name, device=q.device)
            heads = torch.tensor([h for h, n in enumerate(names) if n == name])
            if key not in self.sums:
                n = frame.candidates
                self.sums[key] = torch.zeros(q.shape[1], n, n)
            of_heads = heads.to(q.device)
            maps = _maps(q[:, of_heads], k[:, of_heads], frame, ctx.layout)
            added = sum(picture_sums(m, frame).float().cpu() for m in maps)
            self.sums[key][heads] += added
        self.calls[key] += q.shape[0]

    def _check(self, q: Tensor, ctx: CallContext) -> None:
        self.facts = Facts.of(q, ctx, self.facts)

    def save(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Writes what was added up, whole or not at all.

        Args:
            settings: what it was made with; plain values.
        """
        tensors = {f"metrics.{layer}": m for layer, m in self.metrics.items()}
        tensors |= {f"sums.{s}.{layer}": m for (s, layer), m in self.sums.items()}
        header = {
            "settings": dict(settings),
            "facts": self.facts and self.facts.to_dict(),
            "calls": [[*key, count] for key, count in self.calls.items()],
            "finished": self.finished,
            "block": self.block,
        }
        write_progress(path, _KEY, header, tensors)

    @classmethod
    def load(cls, path: Path, settings: Mapping[str, Any]) -> Tally:
        """What `save` wrote, or an empty tally where there is no file.

        Raises:
            ValueError: the file is damaged, or was made with other settings.
        """
        found = read_progress(path, _KEY, settings)
        return cls(block=int(settings["block"])) if found is None else cls._of(*found)

    @classmethod
    def _of(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tally:
        facts = header["facts"]
        tally = cls(
            block=header["block"],
            facts=facts and Facts.of_dict(facts),
            calls=Counter({tuple(key): count for *key, count in header["calls"]}),
            finished=header["finished"],
        )
        for name, tensor in tensors.items():
            kind, *numbers = name.split(".")
            if kind == "metrics":
                tally.metrics[int(numbers[0])] = tensor
            else:
                tally.sums[int(numbers[0]), int(numbers[1])] = tensor
        return tally


def _maps(q: Tensor, k: Tensor, frame: Frame, layout: TokenLayout) -> list[Any]:
    """`BlockStatistics` of the maps of every batch entry."""
    found = []
    for entry in range(q.shape[0]):
        x, y = (t[entry : entry + 1] for t in (q, k))
        if frame.order is not None:
            x, y = frame.order(x), frame.order(y)
        hidden = None if frame.hidden is None else frame.hidden[entry % len(frame.hidden)]
        tokens = layout.length
        if layout.batch is not None:
            tokens = sum(b - a for a, b in layout.valid_ranges(entry))
        bound = small_weight(tokens)
        found.append(block_statistics(x[0], y[0], frame.blocks, bound, hidden))
    return found
