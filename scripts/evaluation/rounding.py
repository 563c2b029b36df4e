"""How near attention in 8 and 4 bits is to float64, on q, k and v of a real run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.attention import attend, select_backend
from dit_sparse.backend import Backend
from dit_sparse.kernels.emulated import EmulatedBackend
from dit_sparse.methods.window import WindowMethod
from scripts.evaluation.probe import Capture

#: Least cosine with float64 that a precision is held to.
BARS = {"int8": 0.999, "fp8": 0.997}
_ROWS = 512  # queries at a time


def exact(capture: Capture) -> Tensor:
    """Dense attention of a captured call in float64: `[H, N, D]`."""
    q, k, v = (x[0].double() for x in capture.tensors)
    seen = torch.cat(
        [torch.arange(a, b, device=q.device) for a, b in capture.layout.valid_ranges(0)]
    )
    k, v = k[:, seen] / math.sqrt(q.shape[-1]), v[:, seen]
    return torch.cat([(rows @ k.mT).softmax(-1) @ v for rows in q.split(_ROWS, dim=1)], dim=1)


def backends(capture: Capture) -> dict[str, Backend | None]:
    """Everything that rounds, by name, and what does not; `None` for the best backend."""
    found: dict[str, Backend | None] = {"none": None}
    for precision in ("int8", "fp8", "int4"):
        found[f"{precision} emulated"] = EmulatedBackend(precision)  # type: ignore[arg-type]
        rough = EmulatedBackend(precision, smooth=False)  # type: ignore[arg-type]
        found[f"{precision} emulated, mean key left"] = rough
    if capture.q.is_cuda:
        given = capture.tensors
        plan = WindowMethod(density=1.0).plan(*given[:2], capture.context)
        for precision in BARS:
            try:
                kernel, _ = select_backend(*given, plan, precision=precision)  # type: ignore[arg-type]
                found[f"{precision} kernel"] = kernel
            except ValueError:
                continue  # a head dim for which there is none
    return found


def measure(captures: Sequence[Capture]) -> Iterator[dict[str, Any]]:
    """One row for each call and backend: cosines with float64 of whole heads and of single rows."""
    for capture in captures:
        expected = exact(capture)
        q, k, v = capture.tensors
        plan = WindowMethod(density=1.0).plan(q, k, capture.context)
        for name, backend in backends(capture).items():
            got = attend(q, k, v, plan, backend=backend).out[0].double()
            heads = F.cosine_similarity(got.flatten(1), expected.flatten(1), dim=1)
            rows = F.cosine_similarity(got, expected, dim=-1)
            yield {
                "layer": capture.layer,
                "step": capture.step,
                "rounding": name,
                "head_dim": q.shape[-1],
                "cosine": float(heads.mean()),
                "least_head": float(heads.min()),
                "least_row": float(rows.min()),
                "error": float((got - expected).norm() / expected.norm()),
            }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: means and least values over all calls, and whether the bar is met."""
    lines = [
        "| rounding | cosine | least head | least row | relative error | bar |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["rounding"] for row in rows):
        alike = [row for row in rows if row["rounding"] == name]
        cosine, error = (sum(r[key] for r in alike) / len(alike) for key in ("cosine", "error"))
        head, single = (min(r[key] for r in alike) for key in ("least_head", "least_row"))
        bar = BARS.get(name.split()[0])
        verdict = "" if bar is None else f"{bar} {'met' if cosine >= bar else 'missed'}"
        lines.append(
            f"| {name} | {cosine:.6f} | {head:.6f} | {single:.6f} | {error:.2e} | {verdict} |"
        )
    return "\n".join(lines)
