"""Times methods that choose blocks, and PARO's static masks, against dense attention: JSON lines.

    python scripts/bench_methods.py >> benchmarks/methods.jsonl

Selection, summaries, orders and the pass that quantises are inside the times; `hoisted_ms` is the
time with q, k and v in the order of the blocks already, as they would be were it put on the tokens
at the model's entry. q, k and v are random: the speed of the methods does not depend on them where
the number of blocks is fixed, their error does and is not reported here.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a bare checkout

from dit_sparse import methods
from dit_sparse.attention import attend, plan_and_attend, prepare, select_backend
from dit_sparse.bench import environment, time_interleaved
from dit_sparse.calibration import Calibration, pack
from dit_sparse.frame import frame_of
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.method import CallContext
from dit_sparse.model_identity import ModelIdentity

GRIDS = (  # tokens, heads
    ("11x32x48", 24),  # 16,896
    ("21x30x52", 12),  # 32,760
    ("16x32x64", 12),  # 32,768
    ("29x64x64", 24),  # 118,784
)
PYRAMID = {"ends": (0.05, 0.10, 0.15, 0.25)}
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("pisa", {"density": 0.2, "tail": "none"}),
    ("pisa", {"density": 0.2, "tail": "zeroth"}),
    ("pisa", {"density": 0.2, "tail": "first"}),
    ("pisa", {"density": 0.2, "tail": "first", "prior": "norm"}),
    ("pisa", {"density": 0.1, "tail": "zeroth"}),
    ("pisa", {"density": 0.1, "tail": "first"}),
    ("psa", PYRAMID),
    ("psa", PYRAMID | {"skipped": "mean"}),
    ("psa", PYRAMID | {"importance": "means"}),
)
STATIC = (  # grid, text tokens, heads, head dim, precisions
    ("13x30x45", 226, 48, 64, ("bf16",)),  # CogVideoX-5B at 480 x 720, 49 frames
    ("21x45x80", 0, 40, 128, ("bf16", "int8", "fp8")),  # Wan 14B at 720p, 81 frames
)
STATIC_DENSITY = 0.2


@dataclass(frozen=True)
class Problem:
    """Random q, k, v `[1, H, N, D]` in bf16 for a video of this grid."""

    grid: str
    heads: int
    head_dim: int
    text: int = 0

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout.of(TokenGrid.parse(self.grid), self.text)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        shape = (1, self.layout.length, self.heads, self.head_dim)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def measure(problem: Problem, rounds: int) -> Iterator[dict[str, Any]]:
    """One row per method: its time with and without planning or order, and that of dense
    attention."""
    q, k, v = problem.tensors()
    context = CallContext(problem.layout, step=0, steps=1, values=v)
    for name, options in METHODS:
        method = methods.create(name, options)
        plan = method.plan(q, k, context)
        # Without text the blocks of raster order hold what lies there, in whatever order it is.
        in_order = methods.create(name, options | {"order": "raster"})
        backend, _ = select_backend(q, k, v, plan)
        variants: dict[str, Callable[[], Any]] = {
            "dense": lambda: dense(q, k, v),
            "whole": lambda method=method: plan_and_attend(method, q, k, v, context),
            "hoisted": lambda method=in_order: plan_and_attend(method, q, k, v, context),
            "attend": lambda plan=plan: attend(q, k, v, plan),
            "plan": lambda method=method: method.plan(q, k, context),
        }
        timings = time_interleaved(variants, "cuda", rounds=rounds)
        yield {
            "method": name,
            "options": options,
            "grid": problem.grid,
            "tokens": problem.layout.length,
            "heads": problem.heads,
            "head_dim": problem.head_dim,
            "density": plan.density,
            "backend": backend.name,
            **{f"{variant}_ms": timing.median for variant, timing in timings.items()},
            "spread": max(timing.spread for timing in timings.values()),
            "speedup": timings["dense"].median / timings["whole"].median,
            "speedup_hoisted": timings["dense"].median / timings["hoisted"].median,
        }


def made_up(problem: Problem, density: float) -> Calibration:
    """Random masks of a density and random orders: the kernels' time depends on neither."""
    draw = torch.Generator().manual_seed(0)
    grid = problem.layout.grid
    n = frame_of(TokenLayout.of(grid), 128).candidates
    masks = torch.rand(1, problem.heads, n, n, generator=draw) < density
    return Calibration(
        model=ModelIdentity("none", "0"),
        grid=grid,
        block=128,
        orders=torch.randint(6, (1, problem.heads), dtype=torch.uint8, generator=draw),
        segments=(0,),
        masks={0: pack(masks)},
        density=masks.float().mean((2, 3))[None],
        kept_mass=torch.ones(1, 1, problem.heads),
    )


def measure_static(problem: Problem, precisions: Sequence[str], rounds: int) -> dict[str, Any]:
    """PARO with orders per head, as in a pipeline: the plan is there, launches are repeated."""
    q, k, v = problem.tensors()
    with tempfile.TemporaryDirectory() as folder:
        made_up(problem, STATIC_DENSITY).save_pretrained(folder)
        method = methods.create("paro", {"path": folder})
    plan = method.plan(q, k, CallContext(problem.layout, layers=1, step=0, steps=1))
    variants: dict[str, Callable[[], Any]] = {"dense": lambda: dense(q, k, v)}
    for precision in precisions:
        _, prepared = prepare(q, k, v, plan, precision=precision)  # type: ignore[arg-type]
        variants[precision] = lambda again=prepared.again: again(q, k, v)
    timings = time_interleaved(variants, "cuda", rounds=rounds)
    return {
        "method": "paro",
        "options": {"density": STATIC_DENSITY},
        "grid": problem.grid,
        "tokens": problem.layout.length,
        "text": problem.text,
        "heads": problem.heads,
        "head_dim": problem.head_dim,
        "density": plan.density,
        **{f"{name}_ms": timing.median for name, timing in timings.items()},
        "spread": max(timing.spread for timing in timings.values()),
        "speedups": {p: timings["dense"].median / timings[p].median for p in precisions},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("Expected an NVIDIA GPU, got none.")
    where = environment("cuda")
    for grid, text, heads, head_dim, precisions in STATIC:
        row = measure_static(Problem(grid, heads, head_dim, text), precisions, arguments.rounds)
        print(json.dumps(row | {"environment": where}), flush=True)
    for grid, heads in GRIDS:
        for head_dim in arguments.head_dim:
            for row in measure(Problem(grid, heads, head_dim), arguments.rounds):
                print(json.dumps(row | {"environment": where}), flush=True)


if __name__ == "__main__":
    main()
