"""The doctor runs every backend, believes none of them, and reports what it saw."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from dit_sparse import doctor
from dit_sparse.attention import backends
from dit_sparse.backend import AttentionOutput
from dit_sparse.cli import app
from tests.noted_launches import noted


def fake(refusal: str | None = None, change: Any = None) -> SimpleNamespace:
    """A backend that refuses, or runs the reference and changes its output."""
    reference = next(b for b in backends() if b.name == "reference")

    def run(q: Tensor, k: Tensor, v: Tensor, plan: Any, scale: float) -> AttentionOutput:
        out, lse = reference.run(q, k, v, plan, scale)
        return AttentionOutput(change(out), lse)

    return SimpleNamespace(name="fake", reorders=False, refuses=lambda *_: refusal, run=run)


def check_of(monkeypatch: pytest.MonkeyPatch, backend: SimpleNamespace) -> doctor.Check:
    monkeypatch.setattr(doctor, "backends", lambda: (backend,))
    return next(c for c in doctor.examine("cpu").sparse if c.name == "fake")


def test_every_backend_is_examined_on_the_cpu() -> None:
    found = doctor.examine("cpu")
    names = [check.name for check in found.sparse]
    assert [n for n in names if n in {b.name for b in backends()}] == [b.name for b in backends()]
    by_name = {check.name: check for check in found.sparse}
    assert by_name["reference"].ok
    assert found.ok
    assert {check.name for check in found.dense} == {"cudnn", "flash", "efficient", "math"}
    assert next(check for check in found.dense if check.name == "math").ok
    assert found.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_a_refusal_is_shown_word_for_word(monkeypatch: pytest.MonkeyPatch) -> None:
    check = check_of(monkeypatch, fake(refusal="needs a moon"))
    assert (check.ok, check.detail) == (False, "needs a moon")


def test_a_backend_that_computes_nonsense_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_of(monkeypatch, fake(change=lambda out: out)).ok
    check = check_of(monkeypatch, fake(change=lambda out: out + 0.01))
    assert not check.ok
    assert "more than" in check.detail
    assert not check_of(monkeypatch, fake(change=lambda out: out * torch.nan)).ok


def test_a_backend_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(out: Tensor) -> Tensor:
        raise RuntimeError("no driver\nsecond line")

    check = check_of(monkeypatch, fake(change=broken))
    assert (check.ok, check.detail) == (False, "RuntimeError: no driver")


def test_the_probe_is_what_users_run() -> None:
    """Blocks of 128, which the Hopper kernel takes, whole, masked, skipped and short ones."""
    plan = doctor._Probe.on(torch.device("cpu")).plan
    assert plan.q_blocks.size == plan.k_blocks.size == 128
    assert plan.q_blocks.ragged
    assert bool(plan.full.all()), "every row has entries without a mask"
    assert plan.mask_product is not None, "and some have entries that the Hopper kernel masks"
    assert not plan.visited.all()
    assert plan.order is not None
    assert not torch.equal(plan.order.index, torch.arange(plan.order.length))


def test_the_portable_kernel_is_examined_beside_the_chosen_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block_sparse = pytest.importorskip("dit_sparse.kernels.block_sparse")
    tiles = []

    def run(self: Any, q: Tensor, k: Tensor, v: Tensor, plan: Any, scale: float) -> Any:
        tiles.append(self.tile)
        return AttentionOutput(torch.zeros_like(q) if self.tile else q, q[..., 0].float())

    monkeypatch.setattr(block_sparse.TritonBackend, "run", run)
    monkeypatch.setattr(block_sparse.TritonBackend, "refuses", lambda *_: None)
    checks = {check.name: check for check in doctor.examine("cpu").sparse}
    assert list(checks)[:2] == ["triton", "triton, portable"]
    assert tiles[0] is None
    assert tiles[1].keys == 32, "what choose_tile says of float32"
    assert checks["triton"].detail != checks["triton, portable"].detail


def test_missing_packages_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda p: None if p == "triton" else real(p))
    found = doctor.examine("cpu")
    assert found.versions["triton"] is None
    assert "Triton is not installed" in str(found)
    assert "not installed" in str(found).splitlines()[2]


def test_command_exit_code_is_1_when_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--format", "json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["ok"] is True
    monkeypatch.setattr(doctor, "backends", lambda: (fake(refusal="no"),))
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu"])
    assert result.exit_code == 1
    assert "no   fake" in result.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_triton_runs_on_a_gpu() -> None:
    found = doctor.examine("cuda")
    for name in ("triton", "triton, portable"):
        assert next(check for check in found.sparse if check.name == name).ok, str(found)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)
def test_a_hopper_kernel_runs_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = noted(monkeypatch)
    doctor.examine("cuda")
    found = [name for name, _ in runs if name in ("hopper", "gluon")]
    assert len(found) == 1, "for the probe without a tile: full and partial entries"
