"""Values of tensors are read once, and not once too seldom."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor

from dit_sparse.pipelines.memo import once_per_tensor


def test_a_tensor_is_read_once_until_it_changes() -> None:
    reads = []

    @once_per_tensor
    def total(x: Tensor) -> float:
        reads.append(x)
        return float(x.sum())

    x, equal = torch.ones(3), torch.ones(3)
    assert [total(x), total(x), total(equal)] == [3.0, 3.0, 3.0]
    assert len(reads) == 2
    x += 1
    assert total(x) == 6.0
    with torch.inference_mode():
        y = torch.ones(3)
        assert total(y) == 3.0
        y += 1
        assert total(y) == 6.0


def test_a_read_tensor_is_not_kept_alive() -> None:
    total = once_per_tensor(lambda x: float(x.sum()))
    x = torch.ones(3)
    total(x)
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None
