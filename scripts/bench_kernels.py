"""Times block-sparse attention against the dense backends of PyTorch, in one process.

    python scripts/bench_kernels.py --output benchmarks/kernels.jsonl

Every case runs its variants in turn, round by round. Rates count the floating-point operations of
the visited blocks (4 N_q N_k D per head times the measured density). Times include the permutation
and its undoing, but for the variant `ordered`, whose tokens are in the order of the plan, as they
are where it was put on them at the model's entry. `total_ms` has one plan made from scratch too.
`of_bound` is the time over that of the sparse kernel reading everything (`full`) times the share of
blocks that is visited. The error is relative to fp32 on the same inputs. `gemm_tflops` is the rate
of a large product of matrices in the same rounds: what this GPU reaches under its limits of power
and clock.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a bare checkout

from dit_sparse.attention import attend, select_backend
from dit_sparse.backend import AttentionOutput
from dit_sparse.bench import Timing, environment, time_interleaved
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.kernels.block_sparse import TritonBackend
from dit_sparse.method import CallContext
from dit_sparse.methods.window import WindowMethod
from dit_sparse.plan import BlockPlan, Blocks
from dit_sparse.tiling import WindowShape

FLEX_TOKENS = 33_000  # it compiles anew for every shape
GEMM_SIDE = 8192


@dataclass(frozen=True)
class Case:
    """One problem: its size and where its plan comes from."""

    pattern: str
    tokens: int
    heads: int
    head_dim: int
    density: float | None
    grid: str | None = None
    window: tuple[int, ...] | None = None
    stride: tuple[int, ...] | None = None
    text: int = 0

    @property
    def method(self) -> WindowMethod:
        if self.window is None:
            return WindowMethod(density=self.density)
        return WindowMethod(window=self.window, stride=self.stride)

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout.of(TokenGrid.parse(self.grid or ""), text_first=self.text)


RANDOM = [
    Case(pattern, tokens, 24, head_dim, density)
    for head_dim in (128, 64)
    for tokens, pattern, density in (
        (16_896, "random", 1.0),
        (16_896, "random", 0.2),
        (32_768, "random", 1.0),
        (32_768, "random", 0.2),
        (32_768, "clustered", 0.2),
        (32_768, "random", 0.1),
        (32_768, "clustered", 0.1),
        (118_784, "random", 0.1),
        (118_784, "clustered", 0.1),
    )
]
WINDOW = [
    Case("window", grid.length, heads, head_dim, density, str(grid))
    for grid, heads, head_dim in (
        (TokenGrid(21, 30, 52), 12, 128),
        (TokenGrid(21, 45, 80), 40, 128),
        (TokenGrid(30, 48, 80), 24, 128),
        (TokenGrid(13, 30, 45), 48, 64),
        (TokenGrid(1, 64, 64), 24, 128),
        (TokenGrid(1, 128, 128), 24, 128),
    )
    for density in (0.2, 0.1)
]
# FLUX.1 at 4096 pixels, HunyuanVideo and Wan 2.1 at 720p, with the windows of arXiv 2504.16922.
EXPLICIT = [
    Case("window", grid.length + text, heads, 128, None, str(grid), window, stride, text)
    for grid, text, heads, window, strides in (
        (TokenGrid(1, 256, 256), 512, 24, (80, 80), ((16, 16), (1, 1))),
        (TokenGrid(1, 256, 256), 0, 24, (80, 80), ((16, 16), (1, 1))),
        (TokenGrid(30, 48, 80), 0, 24, (18, 24, 24), ((16, 8, 8), (1, 1, 1))),
        (TokenGrid(21, 45, 80), 0, 40, (9, 15, 24), ((3, 5, 8), (1, 1, 1))),
    )
    for stride in strides
]


def block_mask(case: Case, n: int, device: str) -> Tensor:
    """bool `[1, H, n, n]` with the same number of blocks in every row."""
    generator = torch.Generator(device).manual_seed(0)
    scores = torch.rand(1, case.heads, n, n, generator=generator, device=device)
    density = case.density or 1.0
    if case.pattern == "clustered":  # half of each list near the diagonal
        distance = (torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)).abs()
        scores += (distance < density * n / 4) * 1.0
    kept = scores.topk(max(1, round(density * n)), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)


def window_on(case: Case) -> WindowShape:
    return case.method.shape_on(case.layout.grid)


def planner(case: Case, device: str, q: Tensor) -> Callable[[], BlockPlan]:
    """A function that makes the case's plan from scratch."""
    if case.grid is not None:
        context = CallContext(case.layout)
        return lambda: case.method.plan(q, q, context)
    blocks = Blocks.uniform(case.tokens, 128, device)
    mask = block_mask(case, blocks.n, device)
    return lambda: BlockPlan.from_mask(mask, blocks, blocks)


def dense_variants(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    def pinned(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    return {
        "cudnn": pinned(SDPBackend.CUDNN_ATTENTION),
        "flash": pinned(SDPBackend.FLASH_ATTENTION),
    }


def relative_error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> float:
    """Relative Frobenius error of the first head against the reference in fp32."""
    one = slice(0, 1)
    plan = replace(
        plan,
        offsets=plan.offsets[:, one],
        full=plan.full[:, one],
        partial=plan.partial[:, one],
    )
    exact = attend(*(x[:, one].float() for x in (q, k, v)), plan, backend="reference").out
    return float((out[:, one].float() - exact).norm() / exact.norm())


def sparse_variants(
    case: Case, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, with_flex: bool
) -> dict[str, Callable[[], AttentionOutput]]:
    """Attention through the plan, in the caller's order but for `ordered`."""
    flex = with_flex and case.tokens <= FLEX_TOKENS and case.density == 0.2
    variants: dict[str, Callable[[], AttentionOutput]] = {}
    for name in ("triton", "flex") if flex else ("triton",):
        backend, _ = select_backend(q, k, v, plan, name)
        variants[name] = partial(attend, q, k, v, plan, backend=backend)
    unbounded = TritonBackend(bound=False)  # a running maximum instead of a bound
    variants["maximum"] = lambda: attend(q, k, v, plan, backend=unbounded)
    if plan.order is not None:
        q1, k1, v1 = (plan.order(x) for x in (q, k, v))
        in_order = replace(plan, order=None)
        variants["ordered"] = lambda: attend(q1, k1, v1, in_order)
    return variants


def measure(case: Case, rounds: int, with_flex: bool) -> list[dict[str, Any]]:
    """One row per variant."""
    torch.manual_seed(0)
    shape = (1, case.heads, case.tokens, case.head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    make_plan = planner(case, "cuda", q)
    plan = make_plan()
    sparse = sparse_variants(case, q, k, v, plan, with_flex)
    variants: dict[str, Callable[[], Any]] = {**dense_variants(q, k, v), **sparse}
    if case.window is not None:
        blocks = Blocks.uniform(case.tokens, 128, "cuda")
        everything = torch.ones(1, 1, blocks.n, blocks.n, dtype=torch.bool, device="cuda")
        full = BlockPlan.from_mask(everything, blocks, blocks)
        variants["full"] = lambda: attend(q, k, v, full)
    if case.density == 1.0:
        a, b = torch.randn(2, GEMM_SIDE, GEMM_SIDE, device="cuda", dtype=torch.bfloat16)
        variants["gemm"] = lambda: torch.mm(a, b)
    variants["plan"] = make_plan
    times = time_interleaved(variants, "cuda", rounds=rounds)
    gemm = times.pop("gemm", None)
    rows = [row_of(case, name, times, plan.density if name in sparse else 1.0) for name in times]
    for row in rows:
        if gemm is not None:
            row["gemm_tflops"] = round(2 * GEMM_SIDE**3 / gemm.median * 1e-9, 1)
        if (name := row["variant"]) in sparse:
            out = sparse[name]().out
            if name == "ordered" and plan.order is not None:
                out = plan.order.undo(out)
            row["relative_error"] = relative_error(out, q, k, v, plan)
            if "full" in times:
                share = int(plan.count.sum()) / math.ceil(case.tokens / 128) ** 2
                row["of_bound"] = round(row["ms"] / (times["full"].median * share), 3)
    return [row for row in rows if row["variant"] != "plan"]


def row_of(case: Case, name: str, times: dict[str, Timing], density: float) -> dict[str, Any]:
    """What is recorded of one variant; ratios are against dense variants of the same rounds."""
    flop = 4 * case.heads * case.tokens**2 * case.head_dim
    dense = {key: times[key].median for key in ("cudnn", "flash")}
    milliseconds = times[name].median
    total = milliseconds + (0.0 if name in (*dense, "full") else times["plan"].median)
    rate = flop * density / milliseconds * 1e-9
    return {
        **asdict(case),
        "window": None if case.grid is None else str(window_on(case)),
        "variant": name,
        "dtype": "bfloat16",
        "measured_density": round(density, 4),
        "ms": round(milliseconds, 4),
        "spread": round(times[name].spread, 4),
        "total_ms": round(total, 4),
        "tflops": round(rate, 1),
        "of_cudnn": round(rate / (flop / dense["cudnn"] * 1e-9), 3),
        "speedup": round(min(dense.values()) / milliseconds, 3),
        "speedup_with_plan": round(min(dense.values()) / total, 3),
    }


def line_of(row: dict[str, Any]) -> str:
    return (
        f"{row['pattern']:9} N={row['tokens']:<7} H={row['heads']:<3} D={row['head_dim']:<4} "
        f"{row['variant']:7} density {row['measured_density']:.3f} {row['ms']:9.3f} ms "
        f"{row['tflops']:6.1f} TFLOP/s {row['of_cudnn']:5.2f} of cuDNN {row['speedup']:6.2f}x "
        f"({row['speedup_with_plan']:.2f}x with plan) "
        f"error {row.get('relative_error', float('nan')):.1e}"
        + (f" {row['of_bound']:.2f} of the bound" if "of_bound" in row else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/kernels.jsonl"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--flex", action="store_true", help="also FlexAttention, on short cases")
    parser.add_argument("--cases", choices=("random", "window", "explicit", "all"), default="all")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("Expected a CUDA GPU, found none. This benchmark has no meaning on a CPU.")
    cases = {
        "random": RANDOM,
        "window": WINDOW,
        "explicit": EXPLICIT,
        "all": RANDOM + WINDOW + EXPLICIT,
    }[arguments.cases]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    header = environment("cuda")
    print(json.dumps(header))
    with arguments.output.open("w") as lines:
        for case in cases:
            for row in measure(case, arguments.rounds, arguments.flex):
                lines.write(json.dumps({**row, "environment": header}) + "\n")
                lines.flush()
                print(line_of(row))
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
