"""Launches without Triton's launcher: the driver gets the same, from fewer calls."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia.driver")
if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
    pytest.skip("launches are repeated with Triton 3.6 and later", allow_module_level=True)
if shutil.which("gcc") is None or torch.cuda.is_available():
    pytest.skip("needs gcc, and no driver beside the one it makes", allow_module_level=True)

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("driver")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = folder / "libcuda.so.1"
    flags = ["-shared", "-fPIC", "-O1", "-w", f"-I{include}", f"-Wl,-soname,{library.name}"]
    source = str(HERE / "driver_stub.c")
    subprocess.run(["gcc", *flags, source, "-o", str(library)], check=True)
    environment = {
        **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "cache"),  # what is linked here is for this driver
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "launch_twice.py")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_driver_gets_what_triton_would_pass(report: dict[str, Any]) -> None:
    """Parameters byte for byte, grid, threads, shared memory, stream and function."""
    pairs = report["pairs"]
    assert len(pairs) == 5  # in order; permuted; portable without and with maps
    assert all(pair["same"] and pair["stream"] == 77 and pair["bytes"] > 80 for pair in pairs)


def test_what_a_repeated_call_takes(report: dict[str, Any]) -> None:
    """Its host time is mostly the number of calls, of Python's functions and of others'."""
    assert report["in order"]["launches"] == 1
    assert report["in order"]["calls"] <= 38
    assert report["permuted"]["launches"] == 2
    assert report["permuted"]["calls"] <= 58


def test_what_goes_wrong_is_said(report: dict[str, Any]) -> None:
    failures = report["failures"]
    assert failures["error"] == "Expected CUDA to launch a kernel, got: out of order."
    assert failures["misaligned"] == failures["error"]


def test_triton_launches_where_it_has_to(report: dict[str, Any]) -> None:
    """In threads without a context, where a profiler listens, and kernels of other parameters."""
    failures = report["failures"]
    assert failures["without context"] == 1
    assert failures["heard"] == 1
    assert failures["one more parameter"]
    assert failures["a larger parameter"]
