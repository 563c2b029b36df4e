"""Times putting q, k and v into the order of a window's tiles against copying as many bytes.

    python scripts/bench_permute.py --output benchmarks/permute.jsonl

Two kinds of tensors: `heads first`, contiguous `[B, H, N, D]`, and `tokens first`, views of
`[B, N, H, D]` as models make them. `copy` copies q, k and v from device to device in one call of
contiguous memory, in the same rounds; `permute` moves them in one launch, `undo` takes the output
back in another (a third of the bytes). Rates count bytes read and written, not the index, which the
L2 cache holds; `of_copy` is the rate over that of the copy. Results are compared with indexing
first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a bare checkout

from dit_sparse.bench import environment, time_interleaved
from dit_sparse.grid import Permutation, TokenGrid, TokenLayout
from dit_sparse.kernels.permute import permute
from dit_sparse.method import CallContext
from dit_sparse.methods.window import WindowMethod

# FLUX.1 at 4096 pixels, HunyuanVideo and Wan 2.1 at 720p, CogVideoX: grid, text, heads, head dim.
CASES = (
    (TokenGrid(1, 256, 256), 512, 24, 128),
    (TokenGrid(30, 48, 80), 0, 24, 128),
    (TokenGrid(21, 45, 80), 0, 40, 128),
    (TokenGrid(13, 30, 45), 226, 48, 64),
)
KINDS = ("heads first", "tokens first")


def order_on(grid: TokenGrid, text: int, device: str) -> Permutation:
    """The order of the window for a density, text included."""
    nothing = torch.empty(0, device=device)
    layout = TokenLayout.of(grid, text_first=text)
    order = WindowMethod(density=0.2).plan(nothing, nothing, CallContext(layout)).order
    assert order is not None
    return order


def tensors_of(
    kind: str, tokens: int, heads: int, head_dim: int, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v `[1, H, N, D]`."""
    shape = (3, 1, heads, tokens, head_dim) if kind == KINDS[0] else (3, 1, tokens, heads, head_dim)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    drawn = torch.randn(shape, device=device, dtype=dtype)
    q, k, v = drawn if kind == KINDS[0] else drawn.transpose(2, 3)
    return q, k, v


def measure(
    grid: TokenGrid, text: int, heads: int, head_dim: int, kind: str, device: str, rounds: int
) -> list[dict[str, Any]]:
    """A row for each variant.

    Raises:
        RuntimeError: the kernel does not give what indexing gives.
    """
    torch.manual_seed(0)
    order = order_on(grid, text, device)
    inverse = Permutation(order.inverse)
    tokens = grid.length + text
    given = tensors_of(kind, tokens, heads, head_dim, device)
    moved = permute(given, order)
    if not all(torch.equal(x, order(y)) for x, y in zip(moved, given, strict=True)):
        raise RuntimeError(f"Expected the order of indexing on {grid}, {kind}, got another.")
    source = torch.stack([x.contiguous() for x in given])
    target = torch.empty_like(source)
    variants: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        "permute": lambda: permute(given, order),
        "undo": lambda: permute([moved[0]], inverse),
    }
    times = time_interleaved(variants, device, rounds=rounds)
    whole = 2 * source.numel() * source.element_size()
    moves = {"copy": whole, "permute": whole, "undo": whole // 3}
    rates = {name: moves[name] / times[name].median * 1e-6 for name in variants}  # GB/s
    case = {"grid": str(grid), "text": text, "heads": heads, "head_dim": head_dim, "kind": kind}
    return [
        {
            **case,
            "tokens": tokens,
            "dtype": str(source.dtype).removeprefix("torch."),
            "variant": name,
            "ms": round(times[name].median, 4),
            "spread": round(times[name].spread, 4),
            "gb_per_s": round(rates[name], 1),
            "of_copy": round(rates[name] / rates["copy"], 3),
        }
        for name in variants
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/permute.jsonl"))
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("Expected a CUDA GPU, found none. This benchmark has no meaning on a CPU.")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    header = environment("cuda")
    print(json.dumps(header))
    with arguments.output.open("w") as lines:
        for case in CASES:
            for kind in KINDS:
                for row in measure(*case, kind, "cuda", arguments.rounds):
                    lines.write(json.dumps({**row, "environment": header}) + "\n")
                    lines.flush()
                    print(
                        f"{row['grid']:10} {kind:12} {row['variant']:7} {row['ms']:8.3f} ms "
                        f"{row['gb_per_s']:7.0f} GB/s {row['of_copy']:.2f} of the copy",
                        flush=True,
                    )
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
