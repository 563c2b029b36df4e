"""Times a denoising step of full-size transformers with random weights, dense and sparse.

    python scripts/bench_pipeline.py --models wan-1.3b-480p flux-2048 --modes eager compiled

One forward without guidance, bf16, variants in turn. Static plans are in the cache, as in every
step but the first; `plan_ms` is what the first one adds. PISA and PSA plan in every call. Random
weights must not flatter what looks at q and k, so that all read a fixed number of blocks; PARO runs
random orders and masks of the density. `ideal` is the speedup of a sparse kernel with the rate of
dense cuDNN attention and free planning at the measured density, and `of_ideal` how much of it was
reached.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a bare checkout

import dit_sparse
from dit_sparse.attention import dense_attention
from dit_sparse.bench import environment, time_interleaved
from dit_sparse.grid import TokenGrid
from dit_sparse.method import SparseMethod
from scripts.step_variants import paro_method, variants


@dataclass(frozen=True)
class Model:
    """A published transformer configuration and the inputs of one size.

    Args:
        build: makes the transformer on the default device and dtype.
        inputs: makes the arguments of its forward.
        attention: layers, heads, tokens and head dim of its self-attention.
        grid: the picture's tokens.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    attention: tuple[int, int, int, int]
    grid: TokenGrid


def wan(heads: int, ffn: int, layers: int, frames: int, height: int, width: int) -> Model:
    def build() -> nn.Module:
        return WanTransformer3DModel(
            num_attention_heads=heads, ffn_dim=ffn, num_layers=layers, text_dim=4096
        )

    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 16, frames, height, width),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, 512, 4096),
        }

    grid = TokenGrid(frames, height // 2, width // 2)
    return Model(build, inputs, (layers, heads, grid.length, 128), grid)


def flux(pixels: int) -> Model:
    side = pixels // 16

    def build() -> nn.Module:
        return FluxTransformer2DModel(guidance_embeds=True)

    def inputs() -> dict[str, Any]:
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3)
        return {
            "hidden_states": torch.randn(1, side * side, 64),
            "encoder_hidden_states": torch.randn(1, 512, 4096),
            "pooled_projections": torch.randn(1, 768),
            "timestep": torch.tensor([0.5]),
            "guidance": torch.tensor([3.5]),
            "img_ids": ids,
            "txt_ids": torch.zeros(512, 3),
        }

    return Model(build, inputs, (57, 24, side * side + 512, 128), TokenGrid(1, side, side))


def hunyuan(frames: int, height: int, width: int) -> Model:
    def inputs() -> dict[str, Any]:
        mask = torch.zeros(1, 256, dtype=torch.int64)
        mask[:, :40] = 1
        return {
            "hidden_states": torch.randn(1, 16, frames, height, width),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, 256, 4096),
            "encoder_attention_mask": mask,
            "pooled_projections": torch.randn(1, 768),
            "guidance": torch.tensor([6000.0]),
        }

    grid = TokenGrid(frames, height // 2, width // 2)
    return Model(HunyuanVideoTransformer3DModel, inputs, (60, 24, grid.length + 256, 128), grid)


def cogvideox(frames: int, height: int, width: int) -> Model:
    """The 5B model, which has rotary embeddings, unlike the 2B one."""
    heads, layers, text = 48, 42, 226

    def build() -> nn.Module:
        return CogVideoXTransformer3DModel(
            num_attention_heads=heads, num_layers=layers, use_rotary_positional_embeddings=True
        )

    def inputs() -> dict[str, Any]:
        angles = torch.randn(frames * height * width // 4, 64)
        return {
            "hidden_states": torch.randn(1, frames, 16, height, width),
            "encoder_hidden_states": torch.randn(1, text, 4096),
            "timestep": torch.tensor([500.0]),
            "image_rotary_emb": (angles.cos(), angles.sin()),
        }

    grid = TokenGrid(frames, height // 2, width // 2)
    return Model(build, inputs, (layers, heads, grid.length + text, 64), grid)


MODELS = {
    "wan-1.3b-480p": wan(12, 8960, 30, 21, 60, 104),
    "wan-1.3b-720p": wan(12, 8960, 30, 21, 90, 160),
    "wan-14b-480p": wan(40, 13824, 40, 21, 60, 104),
    "wan-14b-720p": wan(40, 13824, 40, 21, 90, 160),
    "flux-1024": flux(1024),
    "flux-2048": flux(2048),
    "flux-4096": flux(4096),
    "hunyuan-720p": hunyuan(33, 90, 160),
    "cogvideox-5b": cogvideox(13, 60, 90),
}


def built(model: Model) -> tuple[nn.Module, dict[str, Any]]:
    """The transformer and its inputs in bf16 on the GPU; index tensors keep their dtype."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        transformer, inputs = model.build().eval(), model.inputs()
    torch.set_default_dtype(torch.float32)
    return transformer, inputs


def attention_ms(model: Model) -> float:
    """Time of all dense self-attention of one forward, measured apart."""
    layers, heads, tokens, dim = model.attention
    shape = (1, tokens, heads, dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    run = {"dense": lambda: dense_attention(q, k, v)}
    return layers * time_interleaved(run, "cuda", rounds=5)["dense"].median


def timed(forward: Callable[[], Tensor]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    forward()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def measure(
    name: str, compiled: bool, rounds: int, densities: Sequence[float], folder: Path
) -> list[dict[str, Any]]:
    """One row per variant of a model; calibrations are put into the folder."""
    model = MODELS[name]
    attention = attention_ms(model)
    transformer, inputs = built(model)
    if compiled:
        transformer.compile_repeated_blocks(fullgraph=True)
    layers, heads = model.attention[:2]
    methods: dict[str, SparseMethod] = dict(variants(densities))
    for density in densities:
        paro = paro_method(transformer, model.grid, layers, heads, density, folder / name)
        methods[f"paro {density}"] = paro
    runs = timed_in_turn(transformer, lambda: transformer(**inputs)[0], methods, rounds)
    fastest = min(runs[v].median for v in ("stock", "dense") if runs[v].times)
    share = attention / fastest
    return [
        {
            "model": name,
            "tokens": model.attention[2],
            "compiled": compiled,
            "variant": variant,
            "attention_share": round(share, 3),
            **(run.record(share, fastest) if run.times else {"failed": run.failure}),
        }
        for variant, run in runs.items()
    ]


@dataclass
class Run:
    """Times of one variant in milliseconds.

    Args:
        times: of forwards.
        first: the host's time of a forward that plans.
        density: measured.
        failure: why there are no times.
    """

    times: list[float] = field(default_factory=list)
    first: float = 0.0
    density: float = 1.0
    failure: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    def record(self, share: float, fastest: float) -> dict[str, Any]:
        """Its part of a row, with what the measured density allows at best."""
        speedup, ideal = fastest / self.median, 1 / (1 - share * (1 - self.density))
        return {
            "measured_density": round(self.density, 4),
            "ms": round(self.median, 2),
            "plan_ms": round(max(0.0, self.first - self.median), 2),
            "speedup": round(speedup, 3),
            "ideal": round(ideal, 3),
            "of_ideal": round(speedup / ideal, 3),
        }


def timed_in_turn(
    transformer: nn.Module,
    forward: Callable[[], Tensor],
    methods: Mapping[str, SparseMethod],
    rounds: int,
) -> dict[str, Run]:
    """Times stock processors, dense attention and the methods; one that fails leaves the others."""
    every: dict[str, Any] = {"stock": None, "dense": "dense", **methods}
    runs = {variant: Run() for variant in every}
    for turn in range(rounds + 1):  # the first one compiles
        for (variant, method), run in zip(every.items(), runs.values(), strict=True):
            if run.failure is not None:
                continue
            dit_sparse.remove(transformer)
            try:
                if method is not None:
                    dit_sparse.apply(transformer, method, steps=1)
                start = time.perf_counter()
                timed(forward)
                run.first = 1e3 * (time.perf_counter() - start)
                if turn:
                    run.times.append(timed(forward))
            except (RuntimeError, ValueError, NotImplementedError) as error:
                if method is None:
                    raise
                run.times, run.failure = [], " ".join(str(error).split())
                continue
            if variant in methods:
                run.density = dit_sparse.summary(transformer).density or 1.0
    dit_sparse.remove(transformer)
    return runs


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["wan-1.3b-480p"])
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--densities", nargs="+", type=float, default=[0.3, 0.2, 0.1])
    parser.add_argument("--append", action="store_true", help="keep the rows that are there")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/steps.jsonl"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("Expected a CUDA GPU, found none. This benchmark has no meaning on a CPU.")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    header = environment("cuda")
    mode_of_file = "a" if arguments.append else "w"
    with arguments.output.open(mode_of_file) as lines, TemporaryDirectory() as folder:
        for name in arguments.models:
            for mode in arguments.modes:
                chosen = (arguments.rounds, arguments.densities, Path(folder))
                for row in measure(name, mode == "compiled", *chosen):
                    lines.write(json.dumps({**row, "environment": header}) + "\n")
                    lines.flush()
                    print({k: v for k, v in row.items() if k != "environment"})
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
