"""Launches compiled kernels through CUDA's driver, with parameters that were laid out before.

Triton's launcher asks every tensor for its address, and the driver whether it is one, encodes
tensor descriptors and reads some sixty numbers again in every launch. That takes the host several
times as long as the launch itself. Parameters lie in memory from one launch to the next here, and
only the addresses of tensors that change are written.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver as active_driver

try:
    from triton.backends.nvidia.driver import make_tensordesc_arg
except ImportError:  # another GPU's Triton
    make_tensordesc_arg = None

_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT, of a thread that has not used the device yet
_MAP_BYTES = 128  # CUtensorMap
_SCALARS: dict[str, type[Any]] = {
    "i1": ctypes.c_int8,
    "i8": ctypes.c_int8,
    "i16": ctypes.c_int16,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "u8": ctypes.c_uint8,
    "u16": ctypes.c_uint16,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
    "fp64": ctypes.c_double,
}


class _Config(ctypes.Structure):
    """CUlaunchConfig without attributes."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


class _Map(ctypes.Structure):
    """CUtensorMap. Keeps the object that it lies in."""

    _fields_ = (("bytes", ctypes.c_byte * _MAP_BYTES),)
    owner: Any


@dataclass(frozen=True)
class _Driver:
    """What is called of libcuda; every function returns a CUresult."""

    launch: Callable[..., int]
    move_map: Callable[..., int]
    parameter_of: Callable[..., int]
    text_of: Callable[..., int]


@dataclass(frozen=True, eq=False)
class DirectLaunch:
    """A launch but for some addresses.

    Args:
        driver: what launches.
        function: handle of the kernel.
        config: address of the `_Config`.
        stream: the stream in it.
        parameters: address of a list of the addresses of the kernel's parameters.
        addresses: those of the tensors that change, and of scratch memory.
        numbers: of those tensors, in the same order.
        maps: where descriptors of such tensors lie, and the place of the tensor in `addresses`.
        scratch: bytes of scratch memory, for all programs.
        stream_of: the current stream of a device.
        kept: what parameters point to, and the tensors that stay.
        lock: held while addresses are written and read.
    """

    driver: _Driver
    function: int
    config: int
    stream: Any
    parameters: int
    addresses: Any
    numbers: tuple[int, ...]
    maps: tuple[tuple[int, int], ...]
    scratch: int
    stream_of: Callable[[int], int]
    kept: tuple[Any, ...]
    lock: Any

    def __call__(self, tensors: Sequence[Tensor]) -> bool:
        """Launches on the current stream of the tensors' device, which must be the current one.

        Returns:
            `False`, and nothing launched, where the thread has no context yet.

        Raises:
            RuntimeError: what the driver says.
        """
        first = tensors[0]
        found = [tensors[number].data_ptr() for number in self.numbers]
        if self.scratch:
            # Freed at once: what takes its place is later on the same stream.
            room = torch.empty_strided((self.scratch,), (1,), dtype=torch.int8, device=first.device)
            found.append(room.data_ptr())
        stream = self.stream_of(first.get_device())
        with self.lock:
            self.addresses[:] = found
            error = 0
            for where, place in self.maps:
                error = error or self.driver.move_map(where, found[place])
            self.stream.value = stream
            error = error or self.driver.launch(self.config, self.function, self.parameters, None)
        if not error:
            return True
        if error == _NO_CONTEXT:
            return False
        raise RuntimeError(f"Expected CUDA to launch a kernel, got: {_text(self.driver, error)}.")


def direct(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: Sequence[Any],
    moving: Sequence[tuple[int, int]],
) -> DirectLaunch | None:
    """A launch of what Triton compiled, made ready.

    Args:
        kernel: Triton's, launched before.
        grid: number of programs along three axes.
        arguments: in the order of its parameters, constants included.
        moving: places of tensors, or of descriptors of tensors, that change, and the numbers that
            these have in calls.

    Returns:
        `None` where that is not possible: for whatever Triton's launcher does but pass parameters,
        for those that it passes in ways unknown here, and where the driver expects others.
    """
    if not isinstance(kernel, CompiledKernel) or not _plain(kernel):
        return None
    if (driver := _driver()) is None:
        return None
    numbers = tuple(dict.fromkeys(number for _, number in moving))
    scratch = grid[0] * grid[1] * grid[2] * kernel.metadata.global_scratch_size
    addresses = (ctypes.c_uint64 * (len(numbers) + bool(scratch)))()
    cells = [ctypes.c_uint64.from_buffer(addresses, 8 * place) for place in range(len(addresses))]
    places = {at: numbers.index(number) for at, number in moving}
    parameters: list[Any] = []
    maps: list[tuple[int, int]] = []
    for at, laid in enumerate(_laid_out(kernel, arguments)):
        if laid is None:
            return None
        if at in places and len(laid) == 1:
            laid = [cells[places[at]]]
        elif at in places:  # a descriptor, whose first parameter is its map
            maps.append((ctypes.addressof(laid[0]), places[at]))
        parameters += laid
    parameters += [cells[-1] if scratch else ctypes.c_uint64(), ctypes.c_uint64()]
    if not _expected(driver, kernel.function, parameters):
        return None
    warps, _, shared = kernel.packed_metadata
    config = _Config(grid, (32 * warps, 1, 1), shared)
    listed = (ctypes.c_void_p * len(parameters))(*map(ctypes.addressof, parameters))
    stays = [argument for at, argument in enumerate(arguments) if at not in places]
    return DirectLaunch(
        driver,
        kernel.function,
        ctypes.addressof(config),
        ctypes.c_uint64.from_buffer(config, _Config.stream.offset),
        ctypes.addressof(listed),
        addresses,
        numbers,
        tuple(maps),
        scratch,
        active_driver.active.get_current_stream,
        (kernel, config, listed, parameters, stays),
        Lock(),
    )


def _plain(kernel: Any) -> bool:
    """Whether Triton's launcher passes parameters to this kernel and does nothing else."""
    about = kernel.metadata
    return (
        about.target.backend == "cuda"
        and about.num_ctas == 1
        and not about.launch_cooperative_grid
        and not about.launch_pdl
        and not about.profile_scratch_size
        and not getattr(about, "instrumentation_mode", "")
    )


def _laid_out(kernel: Any, arguments: Sequence[Any]) -> Iterator[list[Any] | None]:
    """The parameters that each argument becomes, as objects of ctypes; `None` where that is not
    known here."""
    described = iter(getattr(kernel.metadata, "tensordesc_meta", None) or ())
    for kind, argument in zip(kernel.src.signature.values(), arguments, strict=True):
        if kind == "constexpr":
            yield []
        elif not isinstance(kind, str):
            yield None
        elif kind.startswith("tensordesc<"):
            yield _descriptor(argument, next(described, None))
        elif kind.startswith("*"):
            address = argument.data_ptr() if isinstance(argument, Tensor) else argument
            yield [ctypes.c_uint64(address or 0)]
        else:
            yield [_SCALARS[kind](argument)] if kind in _SCALARS else None


def _descriptor(argument: Any, about: Any) -> list[Any] | None:
    """The parameters of a tensor descriptor: a map, as Triton encodes it, shape and strides.

    Args:
        about: what the compiler says of it; `None` where it is not passed as a map.
    """
    if about is None:
        return None
    given = (argument, about, None)[: len(signature(make_tensordesc_arg).parameters)]
    made, *numbers = make_tensordesc_arg(*given)
    # Behind the head of the object, where the driver wants it: a multiple of the map's size.
    where = id(made) + type(made).__basicsize__ - _MAP_BYTES
    if where % _MAP_BYTES:
        return None
    encoded = _Map.from_address(where)
    encoded.owner = made
    rank = len(numbers) // 2
    kinds = [ctypes.c_int32] * rank + [ctypes.c_int64] * rank
    return [encoded, *(kind(number) for kind, number in zip(kinds, numbers, strict=True))]


def _expected(driver: _Driver, function: int, parameters: Sequence[Any]) -> bool:
    """Whether a kernel has parameters of these sizes and no others, as the driver says."""
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()

    def ends(number: int) -> bool:
        return bool(driver.parameter_of(function, number, offset, size))

    for number, parameter in enumerate(parameters):
        if ends(number) or size.value != ctypes.sizeof(parameter):
            return False
    return ends(len(parameters))


@cache
def _driver() -> _Driver | None:
    """`None` where there is none, or one that lacks a function."""
    pointer, number = ctypes.c_void_p, ctypes.c_size_t
    size = ctypes.POINTER(number)
    types: dict[str, tuple[Any, ...]] = {
        "cuLaunchKernelEx": (pointer, pointer, pointer, pointer),
        "cuTensorMapReplaceAddress": (pointer, pointer),
        "cuFuncGetParamInfo": (pointer, number, size, size),
        "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    }
    try:
        library = ctypes.CDLL("libcuda.so.1")
        functions = [library[name] for name in types]
    except (OSError, AttributeError):
        return None
    for function, of_arguments in zip(functions, types.values(), strict=True):
        function.argtypes = of_arguments
    return _Driver(*functions)


def _text(driver: _Driver, error: int) -> str:
    text = ctypes.c_char_p()
    driver.text_of(error, text)
    return (text.value or b"an error without a name").decode()
