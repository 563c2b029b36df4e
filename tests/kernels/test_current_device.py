"""Triton launches on the current device, which need not be that of the tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.frame import frame_of
from dit_sparse.grid import TokenGrid, TokenLayout

attention_map = pytest.importorskip("dit_sparse.kernels.attention_map")
choosing = pytest.importorskip("dit_sparse.kernels.choose")
importance = pytest.importorskip("dit_sparse.kernels.importance")
pool = pytest.importorskip("dit_sparse.kernels.pool")
summaries = pytest.importorskip("dit_sparse.kernels.summaries")

FRAME = frame_of(TokenLayout.of(TokenGrid(1, 8, 8)), 16, "raster", device=torch.device("cpu"))
X = torch.zeros(1, 2, 64, 16)
MEANS = torch.zeros(1, 2, 4, 16)
SCORES = torch.zeros(1, 2, 4, 4)

CALLS: dict[str, tuple[Any, str, Tensor, Callable[[], Any]]] = {
    "means": (pool, "_means_fwd", X, lambda: pool.pool(X, FRAME.blocks)),
    "covariance": (
        *(pool, "_covariance_fwd", X),
        lambda: pool.covariance_sum(X, X, FRAME.blocks, MEANS),
    ),
    "choice": (choosing, "_choose_fwd", SCORES, lambda: choosing.choose(SCORES, FRAME, (2,))),
    "summaries": (
        *(summaries, "_summaries_fwd", X),
        lambda: summaries.measure(X, X, X, FRAME.blocks, None, values=True),
    ),
    "samples": (
        *(importance, "_take_fwd", X),
        lambda: importance.take(X, X, torch.zeros(2, 2, 4, dtype=torch.int64)),
    ),
    "importance": (
        *(importance, "_importance_fwd", X),
        lambda: importance.sampled_maximum(X, X, 16, scale=1.0, softmax=True),
    ),
    "map": (
        *(attention_map, "_attention_map_fwd", X),
        lambda: attention_map.block_statistics(X[0], X[0], FRAME.blocks, 0.1),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_planning_launches(name: str, monkeypatch: pytest.MonkeyPatch):
    module, kernel, expected, call = CALLS[name]
    current: list[Tensor] = []
    launched: list[bool] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        current.append(x)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *_, **__: launched.append(
                len(current) == 1
                and current[0].untyped_storage().data_ptr() == expected.untyped_storage().data_ptr()
            )

    monkeypatch.setattr(module, "device_of", device_of, raising=False)
    monkeypatch.setattr(module, kernel, Kernel())
    call()
    assert launched == [True]
