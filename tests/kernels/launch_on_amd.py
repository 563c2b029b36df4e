"""Calls of the Triton backend over a driver of AMD's that runs nothing, with no part of NVIDIA's.

For `test_amd.py`, which runs it in a process of its own. Prints what it saw as JSON.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

NAME = sys.argv[1]
GPU = torch.device("cuda", 0)
torch.version.hip = "7.0"  # type: ignore[assignment]
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
torch.cuda.is_current_stream_capturing = lambda: False
# What PyTorch says of an MI250 is what it says of an H100.
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(
    gcnArchName=f"{NAME}:sramecc+:xnack-", multi_processor_count=104
)

import triton  # noqa: E402, F401

sys.modules["triton.backends.nvidia.driver"] = None  # type: ignore[assignment]

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.driver import DriverBase  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

import dit_sparse.backend  # noqa: E402
from dit_sparse import selection  # noqa: E402
from dit_sparse.attention_map import block_statistics  # noqa: E402
from dit_sparse.frame import frame_of  # noqa: E402
from dit_sparse.grid import TokenGrid, TokenLayout  # noqa: E402
from dit_sparse.importance import sampled_importance  # noqa: E402
from dit_sparse.kernels import approximate, block_sparse, direct, hopper, known_answers, launch  # noqa: E402
from dit_sparse.kernels.architecture import architecture  # noqa: E402
from dit_sparse.method import CallContext  # noqa: E402
from dit_sparse.methods.window import WindowMethod  # noqa: E402

LAUNCHED: list[str] = []
LAYOUT = TokenLayout.of(TokenGrid(1, 32, 32), text_first=128)


class Launcher:
    """In the place of what Triton builds to launch a kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, *arguments: Any) -> None:
        LAUNCHED.append(self.name)


class Driver(DriverBase):
    """ROCm's, without ROCm."""

    launcher_cls = Launcher
    utils = SimpleNamespace(
        load_binary=lambda name, kernel, shared, device: (1, 2, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 65_536, "arch": NAME},
    )

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", NAME, 64 if NAME.startswith("gfx9") else 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_active_torch_device(self) -> torch.device:
        return GPU

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> None:
        return None


class OnGpu(TorchFunctionMode):
    """All tensors say that they are on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        return func(*args, **(kwargs or {}))


def forbidden(name: str) -> Callable[..., Any]:
    def reached(*arguments: Any, **_: Any) -> Any:
        raise AssertionError(f"Expected nothing of NVIDIA's, got {name} {arguments}.")

    return reached


def launched_by(call: Callable[[], Any]) -> list[str]:
    LAUNCHED.clear()
    call()
    return list(LAUNCHED)


def main() -> None:
    driver.set_active(Driver())
    direct._driver = forbidden("libcuda")
    TensorDescriptor.__post_init__ = forbidden("a descriptor")
    launch.machine_code = forbidden("cuobjdump")
    hopper._launch = forbidden("the kernel for Hopper")
    for module in (approximate, block_sparse, known_answers, hopper, dit_sparse.backend):
        module.architecture = lambda device: architecture(GPU)  # tensors are on the CPU

    shape = (1, LAYOUT.length, 2, 128)
    q, k, v = (torch.randn(shape).bfloat16().transpose(1, 2) for _ in range(3))
    window = WindowMethod(window=(1, 8, 16), tile=(1, 8, 16)).plan(q, k, CallContext(LAYOUT))
    frame = frame_of(LAYOUT, 128, "tile", device=q.device)
    level = torch.randint(0, 2, (1, 2, frame.blocks.n, frame.blocks.n)).byte()
    tails = [
        selection.plan_of_selection(level, frame, tail=tail)
        for tail in ("zeroth", "first", "block")
    ]
    scores = torch.randn(level.shape)
    backend, found, again = block_sparse.BACKEND, {}, []
    with OnGpu():
        found["refusal"] = backend.refuses(q, k, v, window)
        found["window"] = launched_by(
            lambda: again.append(backend.prepare(q, k, v, window, 0.1)[1])
        )
        found["repeated"] = launched_by(lambda: again[0](q, k, v))
        uneven = replace(window, uneven=True, order=None)
        found["uneven"] = launched_by(lambda: backend.run(q, k, v, uneven, 0.1))
        found["tails refused"] = [
            "pooled entries and tails" in (backend.refuses(q, k, v, x) or "") for x in tails
        ]
        found["tails"] = launched_by(lambda: [backend.run(q, k, v, x, 0.1) for x in tails])
        found["means"] = launched_by(lambda: selection.block_means(k, frame))
        found["norms"] = launched_by(lambda: selection.covariance_norms(k, v, frame, centred=True))
        found["choice"] = launched_by(lambda: selection.plan_of_ranks(scores, frame, (2,)))
        found["importance"] = launched_by(lambda: sampled_importance(q, k, frame, share=4))
        found["map"] = launched_by(lambda: block_statistics(q[0], k[0], frame.blocks, bound=0.01))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    with torch.no_grad():
        main()
