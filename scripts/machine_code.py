"""What a compiler made of a kernel for a GPU that need not be there."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dit_sparse.kernels.architecture import generation
from dit_sparse.kernels.launch import SPILLS, flaw, machine_code
from dit_sparse.mask_product import COLUMNS

Q_BLOCK = K_BLOCK = 128
COUNTED = {
    "hgmma": r"[HQI]GMMA",
    "qgmma": r"QGMMA",
    "igmma": r"IGMMA",
    "mma": r"\b[HI]MMA",
    "utcmma": r"UTC\w*MMA",
    "waits": r"WARPGROUP\.DEPBAR",
    "tma": r"UTMALDG",
    "setmaxreg": r"USETMAXREG",
    "spills": r"\b(?:STL|LDL)\b",
}


@dataclass(frozen=True)
class Variant:
    """One compilation: the kernel, its target and its compile-time arguments.

    Args:
        capability: compute capability times ten, or the name of an AMD GPU.
    """

    kernel: str
    capability: int | str
    head_dim: int
    ragged: bool
    box: bool = False
    disk: bool = False
    full: bool = True
    bound: bool = False
    order: bool = True
    tail: int = 0
    block: int = K_BLOCK
    hidden: bool = False
    words: bool = False
    biased: bool = False
    dtype: str = "bf16"
    grouped: bool = False
    queued: bool = False
    added: bool = False

    @property
    def architecture(self) -> str:
        return f"sm_{self.capability}" if isinstance(self.capability, int) else self.capability


@dataclass(frozen=True)
class Report:
    """What the compiler made of a variant.

    Args:
        registers, shared: of a program; bytes of shared memory.
        flaw: why a launch that needs a specialised kernel would refuse it.
        counts: of instructions.
    """

    variant: Variant
    registers: int
    shared: int
    flaw: str | None = None
    counts: dict[str, int] = field(default_factory=dict)


_POINTERS = {
    **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "x0_ptr", "x1_ptr", "x2_ptr"), "*bf16"),
    **dict.fromkeys(("pooled_ptr", "tiled_ptr", "slope_ptr", "each_ptr", "pairs_ptr"), "*bf16"),
    **dict.fromkeys(("means_ptr", "bias_ptr", "k_mean_ptr", "v_mean_ptr"), "*fp32"),
    **dict.fromkeys(("sum_ptr", "centre_ptr", "squares_ptr", "best_ptr"), "*fp32"),
    **dict.fromkeys(("importance_ptr", "scores_ptr", "sums_ptr", "maxima_ptr"), "*fp32"),
    **dict.fromkeys(("small_ptr", "lse_ptr", "share_ptr", "norm_ptr", "longest_ptr"), "*fp32"),
    **dict.fromkeys(("q_step_ptr", "k_step_ptr", "shift_ptr", "centres_ptr", "parts_ptr"), "*fp32"),
    **dict.fromkeys(("step_ptr", "excess_ptr"), "*fp32"),
    **dict.fromkeys(("visited_ptr", "hidden_ptr", "context_ptr"), "*u8"),
    **dict.fromkeys(("order_ptr", "index_ptr"), "*i64"),
    "classes_ptr": "*fp8e5",
    "again_ptr": "*i8",
}


_FLOATS = ("scale", "scale_log2", "unit", "mass", "range_v", "bound", "floor")


def source_of(
    function: Any,
    constants: dict[str, Any],
    descriptors: dict[str, str],
    others: dict[str, str] | None = None,
    kind_of_source: type[ASTSource] = ASTSource,
) -> ASTSource:
    names = [parameter.name for parameter in function.params]
    keys = constants["BLOCK_N"]
    described = dict.fromkeys(("above_desc", "below_desc"), f"tensordesc<i32[1, {K_BLOCK}]>")
    described |= {
        "bias_desc": f"tensordesc<fp32[1, {keys}]>",
        "hidden_desc": f"tensordesc<fp8e5[{keys}, {COLUMNS}]>",
        **descriptors,
    }
    constants = {name: value for name, value in constants.items() if name in names}
    if not descriptors and "k_desc" in names:
        constants |= {"k_desc": None, "v_desc": None}
    pointers = _POINTERS | (others or {})

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.endswith("_desc"):
            return described[name]
        if name.endswith("_ptr"):
            return pointers.get(name, "*i32")
        return "fp32" if name in _FLOATS else "i32"

    aligned = [i for i, n in enumerate(names) if n.endswith("_ptr") or "stride" in n or "col" in n]
    return kind_of_source(
        function,
        {name: kind(name) for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )


def report_of(
    variant: Variant,
    source: ASTSource,
    warps: int,
    stages: int,
    registers: int | None = None,
    *,
    most: int = SPILLS,
) -> Report:
    """Compiles a source as a launcher would.

    Args:
        registers: of a thread at most.
        most: how many of them a launch of a specialised kernel may find in memory.
    """
    options = {"num_warps": warps, "num_stages": stages}
    if isinstance(variant.capability, str):
        cdna = generation(variant.capability)[0] == "cdna"
        target = GPUTarget("hip", variant.capability, 64 if cdna else 32)
        return _read_amd(variant, triton.compile(source, target=target, options=options))
    target = GPUTarget("cuda", variant.capability, 32)
    options |= {"maxnreg": registers}
    return _read(variant, triton.compile(source, target=target, options=options), most)


def _read_amd(variant: Variant, kernel: Any) -> Report:
    """Vector registers of a thread and those kept in memory, as the assembly's metadata say."""
    code = kernel.asm["amdgcn"]
    said = {
        name: int(re.search(rf"\.{name}:\s+(\d+)", code)[1])
        for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    }
    counts = {name: len(re.findall(rf"\bv_{name}_", code)) for name in ("mfma", "wmma")}
    counts |= {"spills": said["vgpr_spill_count"], "scratch": said["private_segment_fixed_size"]}
    return Report(variant, said["vgpr_count"], kernel.metadata.shared, counts=counts)


def _read(variant: Variant, kernel: Any, most: int) -> Report:
    usage, code = (machine_code(kernel, flag) or "" for flag in ("-res-usage", "-sass"))
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None or not code:
        raise RuntimeError(f"Expected cuobjdump to read the code of {variant}, got {usage!r}.")
    counts = {name: len(re.findall(pattern, code)) for name, pattern in COUNTED.items()}
    counts["overlapped"] = _overlapped(code)
    counts["inner_spills"] = _inner_spills(code)
    counts["stale"] = _stale(kernel.asm["ptx"])
    counts["hasty"] = _hasty(kernel.asm["ptx"])
    # The driver counts local memory in words of four bytes for Triton's `n_spills`.
    local = sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage))) // 4
    refused = flaw(kernel.asm["ptx"], code, local, most)
    return Report(variant, int(registers[1]), kernel.metadata.shared, refused, counts)


def _overlapped(code: str) -> int:
    """Exponentials that are issued while a matrix product runs: before the wait for it, or behind
    one that leaves the last product running."""
    count = since = 0
    for found in re.findall(r"[HQI]GMMA|MUFU\.EX2|WARPGROUP\.DEPBAR[^;]*", code):
        if found.endswith("GMMA"):
            since = 1
        elif found == "MUFU.EX2":
            count += since
        else:
            since = int(not found.rstrip().endswith("0x0"))
    return count


def _inner_spills(code: str) -> int:
    """Accesses to local memory in the innermost of the loops that multiply matrices."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@\S+)?\s*([A-Z][\w.]*)([^;]*);", code)
    lines = [(int(at, 16), bool(guard), name, rest) for at, guard, name, rest in found]
    loops = []
    for end, guarded, name, rest in lines:
        to = re.search(r"0x[0-9a-f]+", rest)
        if guarded and name == "BRA" and to is not None and (begin := int(to[0], 16)) <= end:
            inside = [other for at, _, other, _ in lines if begin <= at <= end]
            if any("GMMA" in other for other in inside):
                spills = sum(other.startswith(("LDL", "STL")) for other in inside)
                loops.append((begin, end, spills))
    return sum(
        spills
        for begin, end, spills in loops
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e, _ in loops)
    )


def _hasty(ptx: str) -> int:
    """How often one thread says that all are done, who were not waited for since their products."""
    count = alone = 0
    pattern = r"wgmma\.wait_group|bar(?:rier)?\.sync|mbarrier\.arrive\.shared"
    for found in re.findall(pattern, ptx):
        if found.startswith("mbarrier"):
            count += alone
        else:
            alone = int(found.startswith("wgmma"))
    return count


def _stale(ptx: str) -> int:
    """Places in shared memory that hold one barrier after the other, so that something else may
    come to lie there, and are not invalidated."""
    at = {found[1]: 0 for found in re.finditer(r"mov\.b32\s+([%\w]+), global_smem;", ptx)}
    begun: list[int] = []
    ended: set[int] = set()
    pattern = r"add\.s32\s+(%r\d+), (%r\d+), (\d+);|mbarrier\.(init|inval)\S* \[([%\w]+)\+?(\d*)\]"
    for sum_, register, more, what, place, offset in re.findall(pattern, ptx):
        if sum_ and register in at:
            at[sum_] = at[register] + int(more)
        elif what and place in at:
            address = at[place] + int(offset or 0)
            ended.add(address) if what == "inval" else begun.append(address)
    return len({address for address in begun if begun.count(address) > 1} - ended)
