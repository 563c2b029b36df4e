"""Names of GPUs, and what must not be taken for another one's."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from dit_sparse.kernels.architecture import architecture, follows, generation, refuses

GPU = torch.device("cuda", 0)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    architecture.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    architecture.cache_clear()


def amd(patch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    """PyTorch for ROCm, which says capabilities too."""
    patch.setattr(torch.version, "hip", "7.0")
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    patch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name)
    )


def test_nvidia(on: pytest.MonkeyPatch):
    on.setattr(torch.version, "hip", None)
    on.setattr(torch.cuda, "get_device_capability", lambda device=None: (12, 1))
    assert architecture(GPU) == "sm_121"
    assert follows(architecture(GPU), "sm_90")
    assert not follows("sm_89", "sm_90")


def test_an_mi250_is_no_hopper_gpu(on: pytest.MonkeyPatch):
    """PyTorch says (9, 0) of both."""
    amd(on, "gfx90a:sramecc+:xnack-", (9, 0))
    assert architecture(GPU) == "gfx90a"
    assert not follows(architecture(GPU), "sm_90")


def test_no_gpu():
    assert architecture(torch.device("cpu")) == "cpu"
    assert not follows("cpu", "sm_80")


def test_generations_ascend_within_a_line():
    names = ["gfx906", "gfx908", "gfx90a", "gfx942", "gfx950"]
    assert sorted(names, key=generation) == names
    names = ["gfx1030", "gfx1100", "gfx1201"]
    assert sorted(names, key=generation) == names
    assert generation("gfx950")[0] != generation("gfx1100")[0]
    assert generation("sm_103") == ("sm", (10, 3))


@pytest.mark.parametrize("name", ["cpu", "sm_80", "sm_120", "gfx90a", "gfx942", "gfx1100"])
def test_gpus_with_matrix_units_of_bfloat16(name: str):
    assert refuses(name) is None


@pytest.mark.parametrize("name", ["sm_75", "gfx906", "gfx908", "gfx1030"])
def test_older_ones_are_refused(name: str):
    assert f"got {name}." in (refuses(name) or "")
