"""Fixtures for kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory holds NaN, so that rows that a kernel does not write are seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert bool(torch.empty(3).isnan().all()), "expected torch to fill new memory"
    yield
    torch.use_deterministic_algorithms(before)
