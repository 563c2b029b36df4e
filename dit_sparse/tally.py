"""What a calibration adds up while the dense model runs, and keeps when it is interrupted."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
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
from dit_sparse.plan_io import replace_file

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
        if ctx.steps is None or ctx.step is None:
            raise ValueError(
                "Expected to know the denoising steps for a calibration, got a forward outside a "
                "pipeline. Calibrate the pipeline that will run."
            )
        text = ctx.layout.length - ctx.layout.grid.length
        facts = Facts(ctx.layout.grid, text, ctx.layers, q.shape[1], ctx.steps)
        known = self.facts or facts
        if (known.grid, known.layers, known.heads, known.steps) != (
            *(facts.grid, facts.layers, facts.heads, facts.steps),
        ):
            raise ValueError(
                f"Expected all calls of a calibration to be like the first, {known}, got {facts}. "
                "Calibrate one size and number of steps at a time."
            )
        self.facts = known

    def save(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Writes what was added up, whole or not at all.

        Args:
            settings: what it was made with; plain values.
        """
        tensors = {f"metrics.{layer}": m for layer, m in self.metrics.items()}
        tensors |= {f"sums.{s}.{layer}": m for (s, layer), m in self.sums.items()}
        facts = self.facts and {**vars(self.facts), "grid": str(self.facts.grid)}
        calls = [[*key, count] for key, count in self.calls.items()]
        header = {
            "settings": dict(settings),
            "facts": facts,
            "calls": calls,
            "finished": self.finished,
            "block": self.block,
        }
        metadata = {_KEY: json.dumps(header)}
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, safetensors.torch.save(tensors, metadata))

    @classmethod
    def load(cls, path: Path, settings: Mapping[str, Any]) -> Tally:
        """What `save` wrote, or an empty tally where there is no file.

        Raises:
            ValueError: the file is damaged, or was made with other settings.
        """
        if not path.exists():
            return cls(block=int(settings["block"]))
        try:
            with safetensors.safe_open(os.fspath(path), "pt") as file:
                header = json.loads((file.metadata() or {})[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"Expected the progress of a calibration in {str(path)!r}, got a damaged file "
                f"({error}). Delete it to begin anew."
            ) from error
        changed = [n for n, v in settings.items() if header["settings"].get(n) != v]
        if changed:
            name = changed[0]
            raise ValueError(
                f"Expected to go on with the calibration begun in {str(path.parent)!r}, where "
                f"{name} is {header['settings'].get(name)!r}, got {settings[name]!r}. Give the "
                f"same again, or another folder, or delete {path.name} to begin anew."
            )
        return cls._of(header, tensors)

    @classmethod
    def _of(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tally:
        facts = header["facts"]
        tally = cls(
            block=header["block"],
            facts=facts and Facts(**{**facts, "grid": TokenGrid.parse(facts["grid"])}),
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
