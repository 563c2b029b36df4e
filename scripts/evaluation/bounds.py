"""How often a fixed bound of the scores is too far above them, on q, k and v of a real run.

The Hopper kernel subtracts |q| max |k| from the scores of a query in the place of their maximum. A
row whose weights add up to less than `LEAST_SUM` then has lost keys, and is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dit_sparse.attention import attend
from dit_sparse.methods.window import WindowMethod
from scripts.evaluation.probe import Capture

#: Of the kernels in `kernels/_hopper*.py`.
LEAST_SUM = 2.6e-26
DENSITIES = (1.0, 0.2, 0.1)


def measure(captures: Sequence[Capture]) -> Iterator[dict[str, Any]]:
    """One row for each call and density: by how many powers of 2 the sums are below 1."""
    limit = -math.log2(LEAST_SUM)
    for capture in captures:
        q, k, v = (x.float() for x in capture.tensors)
        scale = q.shape[-1] ** -0.5
        bound = scale * q.norm(dim=-1) * k.norm(dim=-1).amax(-1, keepdim=True)
        for density in DENSITIES:
            plan = WindowMethod(density=density).plan(q, k, capture.context)
            lse = attend(q, k, v, plan, backend="reference").lse
            seen = lse > -torch.inf
            below = ((bound - lse) / math.log(2))[seen]
            yield {
                "layer": capture.layer,
                "step": capture.step,
                "density": plan.density,
                "rows": below.numel(),
                "computed_again": int((below > limit).sum()),
                "median_bits": float(below.median()),
                "most_bits": float(below.max()),
                "limit_bits": limit,
            }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: rows that are computed again, by layer, over steps and densities."""
    lines = [
        "| layer | rows | computed again | bound above the log-sum-exp, median | most |",
        "|---|---|---|---|---|",
    ]
    for layer in dict.fromkeys(row["layer"] for row in rows):
        alike = [row for row in rows if row["layer"] == layer]
        total, again = (sum(row[key] for row in alike) for key in ("rows", "computed_again"))
        median = sorted(row["median_bits"] for row in alike)[len(alike) // 2]
        most = max(row["most_bits"] for row in alike)
        lines.append(
            f"| {layer} | {total:,} | {again} ({again / total:.2%}) | 2^{median:.1f} "
            f"| 2^{most:.1f} |"
        )
    return "\n".join(lines)
