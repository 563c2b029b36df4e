"""Kernel launches that can be repeated on other tensors without looking at every argument again.

Triton's own launch examines some forty arguments to find the compiled kernel, which takes the host
longer than everything else in a call. What it finds depends on sizes, strides, dtypes and on
whether addresses are multiples of 16: for tensors that agree in all of that the kernel, its grid
and all numbers are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import triton
from torch import Tensor
from triton import JITFunction
from triton.runtime.errors import OutOfResources

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None

# A compiled kernel is called with all arguments, constants included; read in 3.6 and 3.9.
_REPEATS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
# So few stand outside the loops, where they cost nothing.
_SPILLS = 16
_LOG = logging.getLogger("dit_sparse")


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
        own; `None` where that is not possible. Keeps none of them."""
        if self.kernel is None:
            return None
        number = {id(tensor): n for n, tensor in enumerate(tensors)}
        fixed, moving = list(self.arguments), []
        for at, argument in enumerate(self.arguments):
            described = TensorDescriptor is not None and isinstance(argument, TensorDescriptor)
            found = number.get(id(argument.base if described else argument))
            if found is not None:
                fields = _without_base(argument) if described else None
                fixed[at] = None
                moving.append((at, found, fields))
        return Repeat(self.kernel[self.grid], tuple(fixed), tuple(moving))


@dataclass(frozen=True, eq=False)
class Repeat:
    """A launch but for some tensors.

    Args:
        run: launches on the current device and stream.
        fixed: arguments, with gaps.
        moving: for every gap its place, the number of the tensor that goes there, and the fields
            of the descriptor around it if it has one.
    """

    run: Callable[..., None]
    fixed: tuple[Any, ...]
    moving: tuple[tuple[int, int, dict[str, Any] | None], ...]

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Launches on tensors of the same sizes, strides and dtypes; see `launch`."""
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
    kernel = jit[grid](
        *arguments, **constants, num_warps=warps, num_stages=stages, maxnreg=registers
    )
    names = getattr(jit, "arg_names", ())[len(arguments) :]
    whole = arguments + tuple(constants[name] for name in names)
    return Launch(kernel if _REPEATS else None, grid, whole)


def launch_specialised(
    jit: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
    *,
    warps: int,
    stages: int,
) -> Launch | None:
    """`launch` of a kernel that has to be warp-specialised; `None`, and nothing launched, if Triton
    did not make it so, or made it spill registers or take more shared memory than there is."""
    known = _verdicts(jit)
    key = (arguments[0].dtype, arguments[0].device, *constants.values())
    if key not in known:
        # Looked at once: what alignment and sizes make of the same kernel differs in little.
        known[key] = _sound(jit, grid, arguments, constants, warps, stages)
    if not known[key]:
        return None
    return launch(jit, grid, arguments, constants, warps=warps, stages=stages)


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
) -> bool:
    """Whether a kernel is compiled as it was meant to be; says so in the log if not."""
    if not isinstance(jit, JITFunction):
        return True  # Triton's interpreter, which compiles nothing
    try:
        kernel = jit.warmup(*arguments, grid=grid, **constants, num_warps=warps, num_stages=stages)
        kernel._init_handles()
    except OutOfResources as error:
        reason = str(error)
    else:
        if "setmaxnreg" not in kernel.asm["ptx"]:
            reason = "its warps are not specialised"
        elif kernel.n_spills > _SPILLS:
            reason = f"it spills {kernel.n_spills} registers"
        else:
            return True
    _LOG.warning(
        "Triton %s compiles %s badly: %s. Another kernel runs in its place.",
        triton.__version__,
        jit.__name__,
        reason,
    )
    return False


def _without_base(descriptor: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(descriptor).items() if name != "base"}


def _described(base: Tensor, fields: dict[str, Any]) -> Any:
    # Its constructor checks again what was true of the tensor before.
    descriptor = object.__new__(TensorDescriptor)
    vars(descriptor).update(fields, base=base)
    return descriptor
