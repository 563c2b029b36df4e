"""Host time per self-attention call, stock and sparse, eager.

    python scripts/bench_overhead.py --output benchmarks/overhead.jsonl

A transformer with so few tokens that the device waits for the host: the time from entering to
leaving its forward, without waiting for the device, divided by the number of attention calls.
Differences to the stock model are what the processor adds to every call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a bare checkout

import dit_sparse
from dit_sparse.bench import environment

LAYERS = 30


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
        for name, prepare in variants.items():
            prepare()
            for timed in (False, False, True):  # plans, compilation and caches are warm then
                if device == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                model(hidden_states=latents, timestep=timestep, encoder_hidden_states=text)
                if timed and turn:
                    times[name].append(1e6 * (time.perf_counter() - start) / LAYERS)
    return {name: statistics.median(values) for name, values in times.items()}


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
    with arguments.output.open("w") as lines:
        for name, value in medians.items():
            added = value - medians["stock"]
            row = {"variant": name, "host_us": round(value, 1), "added_us": round(added, 1)}
            lines.write(json.dumps({**row, "environment": header}) + "\n")
            print(f"{name:12} {value:8.1f} us per layer, {added:+7.1f} us")


if __name__ == "__main__":
    main()
