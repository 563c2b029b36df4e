"""Compilation of the transformer's blocks, and its results kept for the next machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from scripts.training.archive import SHARD_BYTES, write_atomic


def compile_blocks(transformer: Any) -> None:
    """Compiles the repeated blocks; one graph serves all sizes."""
    torch._dynamo.config.recompile_limit = 32
    # Both are wrong for sizes that change, in FluxTransformer2DModel with PyTorch 2.11: an
    # assertion of the one fails, and the other cuts its workspace in the wrong places.
    torch._inductor.config.triton.coalesce_tiling_analysis = False
    torch._inductor.config.triton.mix_order_reduction = False
    transformer.compile_repeated_blocks(dynamic=True)


def read_cache(path: Path) -> None:
    """Hands the compiler what an earlier run compiled; torch checks that it fits."""
    if path.exists():
        torch.compiler.load_cache_artifacts(path.read_bytes())


def write_cache(path: Path) -> None:
    """Keeps what was compiled, if anything was and it may travel."""
    artifacts = torch.compiler.save_cache_artifacts()
    if artifacts is not None and len(artifacts[0]) <= SHARD_BYTES:
        write_atomic(path, artifacts[0])
