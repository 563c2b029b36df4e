"""Host time per self-attention call, stock and sparse, eager, and of the launches alone.

    python scripts/bench_overhead.py --output benchmarks/overhead.jsonl

A transformer with so few tokens that the device waits for the host: the time from entering to
leaving its forward, without waiting for the device, divided by the number of attention calls.
Differences to the stock model are what the processor adds to every call. The launches alone are
those of a call whose plan is at hand, at the tokens, heads and head dim of FLUX at 1024 pixels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a bare checkout

import dit_sparse
from dit_sparse.attention import prepare
from dit_sparse.bench import environment
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.method import CallContext
from dit_sparse.methods.window import WindowMethod
from dit_sparse.plan_cache import PlannedCall

LAYERS = 30
CALLS = 100  # between two waits: fewer than the device's queue holds


def small_wan(device: str) -> nn.Module:
    """As many layers as Wan2.1-1.3B, with two heads of 64."""
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=64,
        num_layers=LAYERS,
    )
    return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()


def host_microseconds(
    model: nn.Module, variants: dict[str, Callable[[], object]], device: str, rounds: int
) -> dict[str, float]:
    """Median host time of a forward per layer, variants in turn, in microseconds."""
    latents = torch.randn(1, 16, 5, 32, 32, device=device, dtype=model.dtype)
    text = torch.randn(1, 8, 32, device=device, dtype=model.dtype)
    timestep = torch.tensor([500.0], device=device)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, change in variants.items():
            change()
            for timed in (False, False, True):  # plans, compilation and caches are warm then
                if device == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                model(hidden_states=latents, timestep=timestep, encoder_hidden_states=text)
                if timed and turn:
                    times[name].append(1e6 * (time.perf_counter() - start) / LAYERS)
    return {name: statistics.median(values) for name, values in times.items()}


def launch_microseconds(rounds: int) -> dict[str, float]:
    """Median host time of an attention call on 4,608 tokens, dense and sparse, in microseconds."""
    layout = TokenLayout.of(TokenGrid(1, 64, 64), text_first=512)
    shape = (1, layout.length, 24, 128)
    q, k, v = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)
    )
    plan = WindowMethod(density=0.3).plan(q, k, CallContext(layout))
    again = prepare(q, k, v, plan)[1].again
    ordered = replace(plan, order=None)
    in_order = prepare(q, k, v, ordered)[1].again
    cached, slow = PlannedCall(ordered), by_triton(in_order)
    calls: dict[str, Callable[[], object]] = {
        "SDPA alone": lambda: F.scaled_dot_product_attention(q, k, v),
        "sparse launches alone": lambda: again(q, k, v),
        "the same, tokens in order": lambda: in_order(q, k, v),
        "in order, found by a layer": lambda: cached.run(q, k, v, None, None),
        "in order, Triton's launcher": lambda: slow(q, k, v),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            if turn:
                times[name].append(1e6 * (time.perf_counter() - start) / CALLS)
    return {name: statistics.median(values) for name, values in times.items()}


def by_triton(again: Any) -> Callable[..., object]:
    """A prepared call whose launches go through Triton, as where none can be repeated directly."""
    launches, *rest = again.args
    slow = tuple(replace(launch, direct=None) for launch in launches)
    return partial(again.func, slow, *rest, **again.keywords)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/overhead.jsonl"))
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = small_wan(device)
    variants: dict[str, Callable[[], object]] = {
        "stock": lambda: dit_sparse.remove(model),
        "dense": lambda: dit_sparse.apply(model, "dense"),
        "window": lambda: dit_sparse.apply(model, "window", options={"density": 0.3}),
        "stock again": lambda: dit_sparse.remove(model),
    }
    medians = host_microseconds(model, variants, device, arguments.rounds)
    header = environment(device)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [
        {"variant": name, "host_us": round(us, 1), "added_us": round(us - medians["stock"], 1)}
        for name, us in medians.items()
    ]
    if device == "cuda":
        alone = launch_microseconds(arguments.rounds)
        rows += [{"variant": name, "host_us": round(us, 1)} for name, us in alone.items()]
    with arguments.output.open("w") as lines:
        for row in rows:
            lines.write(json.dumps({**row, "environment": header}) + "\n")
            print(json.dumps(row))


if __name__ == "__main__":
    main()
