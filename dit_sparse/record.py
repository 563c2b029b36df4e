"""What ran: per layer the calls that were sparse or dense, why, and how much was computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from dit_sparse.plan_cache import PlannedCall


@dataclass
class LayerRecord:
    """The running count of one attention module; the only mutable part of a record.

    Args:
        name: module name in the transformer.
        sparse: calls that ran a plan.
        dense: calls that did not, by reason.
        reused: sparse calls whose plan had served another call before.
        hoisted: sparse calls whose tokens the whole forward kept in the order of the plan.
        permuted: sparse calls that permuted q, k and v themselves, by reason.
        backend: the backend of the latest sparse call.
        refusals: why the backends preferred to that one did not run.
        planned: the latest plan; a copy of the record goes without.
        repeats: calls of that plan whose density is not in `area` yet.
        area: the densities of all other sparse calls, added up where the plans are, since reading
            one waits for the device.
    """

    name: str
    sparse: int = 0
    dense: Counter[str] = field(default_factory=Counter)
    reused: int = 0
    hoisted: int = 0
    permuted: Counter[str] = field(default_factory=Counter)
    backend: str | None = None
    refusals: tuple[str, ...] = ()
    planned: PlannedCall | None = None
    repeats: int = 0
    area: Tensor | float = 0.0

    def ran(self, planned: PlannedCall, backend: str, refusals: tuple[str, ...]) -> None:
        """Counts a sparse call; does not wait for the device."""
        if planned is not self.planned:
            self._settle()
            self.planned = planned
        self.sparse += 1
        self.reused += planned.used
        planned.used = True
        self.repeats += 1
        self.backend, self.refusals = backend, refusals

    @property
    def density(self) -> float | None:
        """Mean measured density of the sparse calls, `None` without any; waits for the device."""
        self._settle()
        return float(self.area) / self.sparse if self.sparse else None

    def summarise(self, transformer: str, layer: int, method: str) -> LayerSummary:
        """A snapshot; waits for the device."""
        return LayerSummary(
            transformer=transformer,
            layer=layer,
            name=self.name,
            method=method,
            backend=self.backend,
            density=self.density,
            sparse=self.sparse,
            dense=self.dense.total(),
            reasons=dict(self.dense),
            refusals=self.refusals,
            reused=self.reused,
            hoisted=self.hoisted,
            permuted=dict(self.permuted),
        )

    def _settle(self) -> None:
        if self.planned is None or not self.repeats:
            return
        added = self.repeats * self.planned.plan.density_tensor
        if isinstance(self.area, Tensor):
            self.area = self.area.to(added.device)  # the model may have moved
        self.area, self.repeats = self.area + added, 0

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {**vars(self), "planned": None, "area": float(self.area)}


@dataclass(frozen=True)
class LayerSummary:
    """What one attention module did since the method was applied.

    Args:
        transformer: component name of its transformer in the pipeline, or its class name.
        layer: number of the module, counted from 0.
        name: module name in the transformer.
        method: name of the method.
        backend: backend of the latest sparse call, `None` when there was none.
        density: measured share of the score matrix that was computed, mean of the sparse calls.
        sparse, dense: numbers of calls.
        reasons: why calls were dense, with counts.
        refusals: why backends preferred to `backend` did not run.
        reused: sparse calls whose plan had served another call before, of this layer or another.
        hoisted: sparse calls whose tokens were put into the order of the plan at the model's entry.
        permuted: why other sparse calls permuted q, k and v in the layer, with counts.
    """

    transformer: str
    layer: int
    name: str
    method: str
    backend: str | None
    density: float | None
    sparse: int
    dense: int
    reasons: Mapping[str, int]
    refusals: tuple[str, ...] = ()
    reused: int = 0
    hoisted: int = 0
    permuted: Mapping[str, int] = field(default_factory=dict)


_HEADER = ("layer", "module", "method", "backend", "density", "sparse", "dense")


@dataclass(frozen=True)
class Summary:
    """What every sparse attention module of a pipeline or transformer did."""

    rows: tuple[LayerSummary, ...]

    @property
    def sparse(self) -> int:
        """Calls that ran a plan, over all layers."""
        return sum(row.sparse for row in self.rows)

    @property
    def dense(self) -> int:
        """Calls that ran dense attention, over all layers."""
        return sum(row.dense for row in self.rows)

    @property
    def density(self) -> float | None:
        """Mean measured density of the sparse calls, weighted by calls; `None` without any."""
        measured = [(row.density, row.sparse) for row in self.rows if row.density is not None]
        calls = sum(count for _, count in measured)
        return sum(density * count for density, count in measured) / calls if calls else None

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that ran, in alphabetical order."""
        return tuple(sorted({row.backend for row in self.rows if row.backend is not None}))

    @property
    def reasons(self) -> dict[str, int]:
        """Why calls were dense, over all layers, the most frequent reason first."""
        return _total(row.reasons for row in self.rows)

    @property
    def reused(self) -> int:
        """Sparse calls whose plan had served another call before."""
        return sum(row.reused for row in self.rows)

    @property
    def hoisted(self) -> int:
        """Sparse calls whose tokens were put into the order of the plan at the model's entry."""
        return sum(row.hoisted for row in self.rows)

    @property
    def permuted(self) -> dict[str, int]:
        """Why other sparse calls permuted in the layer, the most frequent reason first."""
        return _total(row.permuted for row in self.rows)

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why preferred backends did not run, each sentence once."""
        return tuple(dict.fromkeys(r for row in self.rows for r in row.refusals))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the totals and one dictionary per layer."""
        return {
            "sparse": self.sparse,
            "dense": self.dense,
            "density": self.density,
            "backends": list(self.backends),
            "reasons": self.reasons,
            "reused": self.reused,
            "hoisted": self.hoisted,
            "permuted": self.permuted,
            "refusals": list(self.refusals),
            "layers": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        cells = [_HEADER, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        lines += [f"dense {count} times: {reason}" for reason, count in self.reasons.items()]
        if self.hoisted:
            lines.append(f"tokens reordered once per forward: {self.hoisted} sparse calls")
        lines += [f"reordered in the layer {n} times: {why}" for why, n in self.permuted.items()]
        lines += [f"backend passed over: {refusal}" for refusal in self.refusals]
        return "\n".join(lines)


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total.most_common())


def _cells(row: LayerSummary) -> tuple[str, ...]:
    density = "-" if row.density is None else f"{row.density:.3f}"
    place = f"{row.transformer}.{row.name}"
    counts = (str(row.sparse), str(row.dense))
    return (str(row.layer), place, row.method, row.backend or "-", density, *counts)
