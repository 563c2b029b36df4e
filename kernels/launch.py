"""Kernel launches that can be repeated on other tensors without looking at every argument again.

Triton's own launch examines some forty arguments to find the compiled kernel, which takes the host
longer than everything else in a call. What it finds depends on sizes, strides, dtypes and on
whether addresses are multiples of 16: for tensors that agree in all of that the kernel, its grid
and all numbers are the same.
"""

from __future__ import annotations

import contextvars
import logging
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import triton
from torch import Tensor
from triton import JITFunction
from triton.runtime.errors import OutOfResources

from dit_sparse.kernels.direct import DirectLaunch, direct

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None
try:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
except ImportError:  # a Triton without Gluon for Hopper
    GluonDescriptor = None

# A compiled kernel is called with all arguments, constants included; read in 3.6 and 3.9.
_REPEATS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
# So few stand outside the loops, where they cost nothing.
SPILLS = 16
_PRODUCT, _WAIT = r"[HQI]GMMA", r"WARPGROUP\.DEPBAR"
# Serialised products are waited for one by one; all kernels here have at least two to a wait.
_PRODUCTS_A_WAIT = 2
_MOST_PAIRS = 65_535  # programs along a grid's second axis [CUDA]
_DESCRIPTORS = tuple(kind for kind in (TensorDescriptor, GluonDescriptor) if kind is not None)
_LOG = logging.getLogger("dit_sparse")

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Launch:
    """A launch that was made.

    Args:
        kernel: the compiled kernel; `None` where launches cannot be repeated, as in Triton's
            interpreter.
        grid: number of programs along three axes, all of which a compiled kernel wants.
        arguments: in the order of the kernel's parameters.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]

    def repeatable(self, tensors: Sequence[Tensor]) -> Repeat | None:
        """The launch with other tensors in the places of these, which must all be objects of their
        own; `None` where that is not possible. Keeps none of them.

        Raises:
            ValueError: an argument is a view of one of them, whose place would be that of the first
                call for ever.
        """
        if self.kernel is None:
            return None
        number = {id(tensor): n for n, tensor in enumerate(tensors)}
        memory = {tensor.untyped_storage().data_ptr() for tensor in tensors} - {0}
        fixed, moving = list(self.arguments), []
        for at, argument in enumerate(self.arguments):
            described = isinstance(argument, _DESCRIPTORS)
            tensor = argument.base if described else argument
            found = number.get(id(tensor))
            if found is not None:
                fields = _without_base(argument) if described else None
                fixed[at] = None
                moving.append((at, found, fields))
            elif isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in memory:
                raise ValueError(
                    f"Expected tensors of the call itself as arguments, got a view {at} of one, "
                    f"{tuple(tensor.shape)}. Pass the tensor, or describe it with its own base."
                )
        places = [(at, found) for at, found, _ in moving]
        return Repeat(
            self.kernel[self.grid],
            tuple(fixed),
            tuple(moving),
            direct(self.kernel, self.grid, self.arguments, places),
        )


@dataclass(frozen=True, eq=False)
class Repeat:
    """A launch but for some tensors.

    Args:
        run: launches on the current device and stream.
        fixed: arguments, with gaps.
        moving: for every gap its place, the number of the tensor that goes there, and the fields
            of the descriptor around it if it has one.
        direct: the same launch without Triton, where that is possible.
    """

    run: Callable[..., None]
    fixed: tuple[Any, ...]
    moving: tuple[tuple[int, int, dict[str, Any] | None], ...]
    direct: DirectLaunch | None = None

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Launches on tensors of the same sizes, strides and dtypes; see `launch`."""
        if self.direct is not None and not _watched():
            if self.direct(tensors):
                return
            # Triton gives a thread its context too late for descriptors; this does it now.
            tensors[0].new_zeros(1)
        with_scratch(partial(self._by_triton, tensors))

    def _by_triton(self, tensors: Sequence[Tensor]) -> None:
        arguments = list(self.fixed)
        for at, number, fields in self.moving:
            tensor = tensors[number]
            arguments[at] = tensor if fields is None else _described(tensor, fields)
        self.run(*arguments)


def launch(
    jit: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
    *,
    warps: int,
    stages: int,
    registers: int | None = None,
) -> Launch:
    """Launches a Triton function.

    Args:
        grid: number of programs along three axes.
        arguments: the first parameters, in order.
        constants: all others, by name.
        registers: of a thread at most; `None`: as many as the compiler likes.
    """
    bounded = {} if registers is None else {"maxnreg": registers}  # which AMD's compiler has not
    kernel = jit[grid](*arguments, **constants, num_warps=warps, num_stages=stages, **bounded)
    names = getattr(jit, "arg_names", ())[len(arguments) :]
    whole = arguments + tuple(constants[name] for name in names)
    return Launch(kernel if _REPEATS else None, grid, whole)


def with_scratch(run: Callable[[], T]) -> T:
    """Runs in a context of its own, which leaves the allocator that others set alone."""

    def inside() -> T:
        triton.set_allocator(_scratch)
        return run()

    return contextvars.copy_context().run(inside)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors that each program makes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def device_of(q: Tensor) -> AbstractContextManager[None]:
    """Makes the device of q current, which Triton launches on."""
    index = q.get_device()  # -1: not on a GPU
    if index < 0 or index == torch.cuda.current_device():
        return _NOWHERE_ELSE
    return torch.cuda.device(q.device)


_NOWHERE_ELSE = nullcontext()


def _watched() -> bool:
    """Whether a profiler wants to hear from Triton of every launch."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def refuses_heads(q: Tensor) -> str | None:
    """Why grids that have heads along their second axis cannot have those of q `[B, H, N, D]`."""
    pairs = q.shape[0] * q.shape[1]
    if pairs <= _MOST_PAIRS:
        return None
    return (
        f"expected at most {_MOST_PAIRS} heads of all batch entries, got {q.shape[0]} * "
        f"{q.shape[1]}. Split the batch."
    )


def launch_specialised(
    jit: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
    *,
    warps: int,
    stages: int,
    spills: int = SPILLS,
) -> Launch | None:
    """`launch` of a kernel that has to be warp-specialised; `None`, and nothing launched, if Triton
    did not make it so, failed, or made it spill registers, take more shared memory than there is,
    or wait for every matrix product.

    Args:
        spills: so many registers may be in memory, which is for the caller to know of the kernel.
    """
    known = _verdicts(jit)
    kinds = (_kind(argument) for argument in arguments)
    key = (_device(arguments[0]), spills, *constants.values(), *kinds)
    if key not in known:
        # Looked at once: what alignment makes of the same kernel differs in little.
        known[key] = _sound(jit, grid, arguments, constants, warps, stages, spills)
    if not known[key]:
        return None
    return launch(jit, grid, arguments, constants, warps=warps, stages=stages)


def _device(argument: Any) -> torch.device:
    tensor = argument.base if isinstance(argument, _DESCRIPTORS) else argument
    return cast(Tensor, tensor).device


def _kind(argument: Any) -> object:
    """What Triton compiles for of an argument: its dtype, or whether it is 1, a constant then."""
    if isinstance(argument, Tensor):
        return argument.dtype
    if isinstance(argument, _DESCRIPTORS):
        return argument.base.dtype
    return argument == 1


@cache
def _verdicts(jit: Any) -> dict[tuple[Any, ...], bool]:
    """What is known of a function's kernels."""
    return {}


def _sound(
    jit: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
    warps: int,
    stages: int,
    spills: int,
) -> bool:
    """Whether a kernel is compiled as it was meant to be; says so in the log if not."""
    if not isinstance(jit, JITFunction):
        return True  # Triton's interpreter, which compiles nothing
    options = {"num_warps": warps, "num_stages": stages}  # those of `launch`
    reason: str | None
    try:
        kernel = jit.warmup(*arguments, grid=grid, **constants, **options)
    except Exception as error:  # Triton's passes, LLVM and ptxas fail in ways of their own
        reason = f"{type(error).__name__}: {_first_line(error)}"
    else:
        reason = _flaw_of(kernel, spills)
    if reason is None:
        return True
    _LOG.warning(
        "Triton %s compiles %s badly: %s. It is not used.",
        triton.__version__,
        jit.__name__,
        reason,
    )
    return False


def _flaw_of(kernel: Any, most: int) -> str | None:
    """What is wrong with what Triton compiled; raises what the driver says of anything else."""
    try:
        kernel._init_handles()
    except OutOfResources as error:
        return _first_line(error)
    ptx, spills = kernel.asm["ptx"], kernel.n_spills
    return flaw(ptx, None, spills, most) or flaw(ptx, machine_code(kernel), spills, most)


def flaw(ptx: str, sass: str | None, spills: int, most: int = SPILLS) -> str | None:
    """What is wrong with a specialised kernel; `None` if nothing is.

    Args:
        ptx: its code for ptxas.
        sass: its machine code; `None` where it cannot be read.
        spills: registers that it keeps in local memory.
        most: how many it may.
    """
    if "setmaxnreg" not in ptx:
        return "its warps are not specialised"
    if spills > most:
        return f"it spills {spills} registers"
    if sass is not None:
        # ptxas says that it serialised them (C7510 and others) to a log that Triton throws away.
        products, waits = (len(re.findall(pattern, sass)) for pattern in (_PRODUCT, _WAIT))
        if products < _PRODUCTS_A_WAIT * waits:
            return f"it waits {waits} times for {products} matrix products"
    return None


def machine_code(kernel: Any, show: str = "-sass") -> str | None:
    """What Triton compiled, as the tool beside it shows it; `None` where it cannot."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists() or "cubin" not in kernel.asm:
        return None
    try:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(kernel.asm["cubin"])
            cubin.flush()
            command = [str(tool), show, cubin.name]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 and done.stdout else None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no reason given")


def _without_base(descriptor: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(descriptor).items() if name != "base"}


def _described(base: Tensor, fields: dict[str, Any]) -> Any:
    # Its constructor checks again what was true of the tensor before.
    kind = GluonDescriptor if "layout" in fields else TensorDescriptor
    descriptor = object.__new__(kind)
    vars(descriptor).update(fields, base=base)
    return descriptor
