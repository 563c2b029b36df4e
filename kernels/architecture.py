"""Which GPU a device is, by the name that its compiler has for it."""

from __future__ import annotations

from functools import cache

import torch

#: Where the GPU tests have run; on a CPU is Triton's interpreter.
MEASURED = ("sm_90", "cpu")
#: Makers' lines of GPUs, each with numbers of its own. CDNA has warps of 64 threads, RDNA of 32.
_NVIDIA, _CDNA, _RDNA = "sm", "cdna", "rdna"
# The first ones that multiply matrices of bfloat16 in instructions that the kernels were compiled
# to.
_OLDEST = {_NVIDIA: (8, 0), _CDNA: (9, 0, 10), _RDNA: (11, 0)}


@cache
def architecture(device: torch.device) -> str:
    """Such as `"sm_90"` or `"gfx942"`; `"cpu"` where there is no GPU. Asked in every call."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip is not None:
        # Behind the name stand features of the device: "gfx90a:sramecc+:xnack-".
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def generation(name: str) -> tuple[str, tuple[int, ...]]:
    """The line of an architecture, and a number that grows with it: of NVIDIA's the compute
    capability. What is no GPU counts as older than all of NVIDIA's."""
    if name.startswith("gfx"):
        digits = name.removeprefix("gfx")
        number = (int(digits[:-2]), *(int(digit, 16) for digit in digits[-2:]))
        return (_CDNA if number[0] == 9 else _RDNA), number
    if name.startswith("sm_"):
        return _NVIDIA, divmod(int(name.removeprefix("sm_")), 10)
    return _NVIDIA, (0, 0)


def follows(name: str, oldest: str) -> bool:
    """Whether an architecture is this one, or a later one of its line."""
    (line, number), (of, since) = generation(name), generation(oldest)
    return line == of and number >= since


def refuses(name: str) -> str | None:
    """Why no kernel is for GPUs of an architecture."""
    line, number = generation(name)
    if name == "cpu" or number >= _OLDEST[line]:
        return None
    return (
        "expected compute capability 8.0 or later, or an AMD GPU of gfx90a, gfx94x, gfx95x, gfx11 "
        f"or later, got {name}."
    )
