"""Repeats launches with and without Triton's launcher over a driver that runs nothing.

For `test_direct.py`, which runs it in a process of its own with `driver_stub.c` in the place of
libcuda. Prints what it saw as JSON.
"""

from __future__ import annotations

import cProfile
import ctypes
import json
import pstats
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

STUB = ctypes.CDLL("libcuda.so.1")
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda device=None: (9, 0)

import triton  # noqa: E402
from triton.backends.nvidia.driver import CudaDriver  # noqa: E402
from triton.runtime import driver  # noqa: E402

from dit_sparse.grid import TokenGrid, TokenLayout  # noqa: E402
from dit_sparse.kernels import block_sparse, hopper, launch, portable, rooms  # noqa: E402
from dit_sparse.kernels.tiles import Tile  # noqa: E402
from dit_sparse.method import CallContext  # noqa: E402
from dit_sparse.methods.window import WindowMethod  # noqa: E402
from dit_sparse.plan import BlockPlan  # noqa: E402

LAYOUT = TokenLayout.of(TokenGrid(1, 32, 32), text_first=128)
STREAM = 77
SIZES = {"u8": 1, "u16": 2, "u32": 4, "b32": 4, "f32": 4, "u64": 8, "b64": 8, "f64": 8}


def number(name: str) -> ctypes.c_int:
    return ctypes.c_int.in_dll(STUB, name)


def set_driver() -> None:
    active = CudaDriver()
    active.get_current_device = lambda: 0
    active.get_current_stream = lambda device: STREAM
    active.get_device_capability = lambda device: (9, 0)
    driver.set_active(active)


def plan(ordered: bool) -> BlockPlan:
    q = torch.empty(1, 1, 1, 1)
    made = WindowMethod(window=(1, 8, 16), tile=(1, 8, 16)).plan(q, q, CallContext(LAYOUT))
    return made if ordered else replace(made, order=None)


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    shape = (1, LAYOUT.length, 2, 128)
    q, k, v = (torch.zeros(shape, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    return q, k, v


@contextmanager
def expecting(kernel: Any) -> Iterator[None]:
    """The driver knows how many bytes each parameter has, as the compiler says."""
    sizes = []
    for kind, behind in re.findall(r"\.param (.*)_param_\d+(.*)", kernel.asm["ptx"]):
        array = re.match(r"\[(\d+)\]", behind)
        sizes.append(int(array[1]) if array else SIZES[kind.split()[0].lstrip(".")])
    (ctypes.c_int * 512).in_dll(STUB, "expected_sizes")[: len(sizes)] = sizes
    number("expected_count").value = len(sizes)
    yield
    number("expected_count").value = 0


def seen() -> tuple[bytes, list[int]]:
    """What the driver got last."""
    size = number("parameter_bytes").value
    setting = list((ctypes.c_uint64 * 10).in_dll(STUB, "setting"))
    return bytes((ctypes.c_ubyte * size).in_dll(STUB, "parameters")), setting


@contextmanager
def one_scratch() -> Iterator[None]:
    """The same scratch memory for both ways."""
    memory, real = torch.zeros(1 << 20, dtype=torch.int8), torch.empty_strided
    torch.empty_strided = launch._scratch = lambda *given, **named: memory
    yield
    torch.empty_strided = real
    launch._scratch = lambda size, *_: torch.empty(size, dtype=torch.int8)


def both_ways(made: Any, before: Sequence[Tensor], after: Sequence[Tensor]) -> dict[str, Any]:
    """A launch on `before`, repeated on `after` in both ways."""
    repeat = ready(made, before)
    with expecting(made.kernel), one_scratch():
        assert repeat.direct(after)
        ours = seen()
        (ctypes.c_ubyte * (1 << 16)).in_dll(STUB, "parameters")[:] = bytes(1 << 16)
        launch.with_scratch(lambda: repeat._by_triton(after))
    return {"bytes": len(ours[0]), "same": ours == seen(), "stream": ours[1][7]}


def ready(made: Any, tensors: Sequence[Tensor]) -> Any:
    with expecting(made.kernel):
        repeat = made.repeatable(tensors)
    assert repeat.direct is not None
    return repeat


def launched(ordered: bool) -> tuple[Any, list[Any]]:
    """Room and launches of a call as on Hopper."""
    one = plan(ordered)
    room, launches = rooms.in_order(*tensors(), one, queries=True, bounded=False)
    launches.append(hopper.launch(*room.ordered, one, 0.125, room.result))
    return room, launches


def calls_of(ordered: bool) -> dict[str, int]:
    """What a repeated call takes."""
    room, launches = launched(ordered)
    repeats, moved = [ready(one, room.tensors) for one in launches], 3 if ordered else 0
    inputs = tensors()
    block_sparse._again(repeats, moved, False, *inputs)
    before, profile = number("launches").value, cProfile.Profile()
    profile.enable()
    block_sparse._again(repeats, moved, False, *inputs)
    profile.disable()
    stats: Any = pstats.Stats(profile)
    return {"launches": number("launches").value - before, "calls": stats.total_calls}


def failures() -> dict[str, Any]:
    """What becomes of errors, of threads without a context, of watched and unexpected kernels."""
    room, (main,) = launched(ordered=False)
    repeat, found = ready(main, room.tensors), {}
    number("next_error").value = 1
    found["error"] = error_of(repeat, room.tensors)
    found["misaligned"] = error_of(repeat, shifted(room.tensors))
    count = number("launches").value
    number("next_error").value = 201
    repeat(room.tensors)
    found["without context"] = number("launches").value - count
    heard: list[object] = []
    triton.knobs.runtime.launch_enter_hook.add(heard.append)
    repeat(room.tensors)
    triton.knobs.runtime.launch_enter_hook.remove(heard.append)
    repeat(room.tensors)
    found["heard"] = len(heard)
    with expecting(main.kernel):
        number("expected_count").value += 1
        found["one more parameter"] = main.repeatable(room.tensors).direct is None
    with expecting(main.kernel):
        (ctypes.c_int * 512).in_dll(STUB, "expected_sizes")[3] += 4
        found["a larger parameter"] = main.repeatable(room.tensors).direct is None
    return found


def shifted(given: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that no descriptor can address."""
    return [torch.empty(8, dtype=t.dtype)[1:] for t in given]


def error_of(repeat: Any, given: Sequence[Tensor]) -> str:
    try:
        repeat(given)
    except RuntimeError as error:
        return str(error)
    return ""


def main() -> None:
    set_driver()
    launch._scratch = lambda size, *_: torch.empty(size, dtype=torch.int8)
    pairs = []
    for ordered in (False, True):
        (room, launches), (other, _) = launched(ordered), launched(ordered)
        pairs += [both_ways(one, room.tensors, other.tensors) for one in launches]
    for tma in (False, True):  # on the permuted room, whose keys are views of one tensor
        tile = Tile(64, 4, 2, tma=tma)
        one = portable.launch(room.q, *room.ordered[1:], plan(True), 0.125, tile, room.result)
        pairs.append(both_ways(one, room.tensors, other.tensors))
    report = {
        "pairs": pairs,
        "in order": calls_of(ordered=False),
        "permuted": calls_of(ordered=True),
        "failures": failures(),
    }
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    with torch.no_grad():
        main()
