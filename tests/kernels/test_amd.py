"""What a call does on AMD's GPUs: Triton's ordinary launches of kernels compiled for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("triton.backends.amd.compiler")
if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
    pytest.skip("compiled with Triton 3.6 and later", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("needs no driver beside the one it makes", allow_module_level=True)

SCRIPT = Path(__file__).parent / "launch_on_amd.py"


@pytest.fixture(scope="module", params=["gfx90a", "gfx1100"])
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), request.param],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {"name": request.param, **json.loads(done.stdout)}


def test_a_driver_that_runs_nothing_gives_no_known_answers(found: dict[str, Any]):
    assert f"known answers on {found['name']} (Triton" in found["refusal"]


def test_calls_take_the_portable_kernel_through_tritons_launcher(found: dict[str, Any]):
    """Although PyTorch says capability 9.0; the script fails where anything of NVIDIA's is met."""
    assert found["window"] == ["_permute_rows", "_portable_fwd"]
    assert found["repeated"] == found["window"]
    assert found["uneven"] == ["_longest_first_fwd", "_portable_fwd"]


def test_tails_compile_and_are_refused_where_they_do_so_badly(found: dict[str, Any]):
    assert found["tails refused"] == [found["name"] == "gfx1100"] * 3
    assert found["tails"].count("_portable_fwd") == 3
    assert found["tails"].count("_approximate_fwd") == 3


@pytest.mark.parametrize("what", ["means", "norms", "choice", "importance", "map"])
def test_pytorch_plans_there(found: dict[str, Any], what: str):
    """Kernels that plan are not asked for known answers."""
    assert found[what] == []
