"""Test setup: without a GPU the Triton kernels run in the interpreter."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("dit_sparse", deadline=None)  # first calls compile and fill caches
settings.load_profile("dit_sparse")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _memory_for_others() -> Iterator[None]:
    """Gives a GPU's memory back, which other processes of the run need."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
