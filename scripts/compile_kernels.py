"""Compiles every kernel variant for a GPU that need not be there, and reads the machine code.

    python scripts/compile_kernels.py --format json
    PYTHONPATH=folder/with/another/triton python scripts/compile_kernels.py --only hopper_gluon

Small changes of a kernel's source make Triton drop warp specialisation, serialise the matrix
instructions or spill registers without a word. Registers, spills and the counts of the
instructions that matter show it. With `--amd` it compiles what AMD's GPUs run, and reads the
assembly. Needs Triton with its bundled tools, no GPU. Without `--all` it compiles one of those
combinations that differ in little.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions cannot be compiled

import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a bare checkout

from dit_sparse.kernels import importance, pooled, quantise
from dit_sparse.kernels._approximate import _approximate_fwd
from dit_sparse.kernels._attention_map import _attention_map_fwd
from dit_sparse.kernels._choose import _choose_fwd
from dit_sparse.kernels._deal import _deal_fwd
from dit_sparse.kernels._hopper import _block_sparse_fwd_hopper
from dit_sparse.kernels._hopper_pooled import _pooled_fwd_hopper
from dit_sparse.kernels._hopper_quantised import _quantised_fwd_hopper
from dit_sparse.kernels._importance import _importance_fwd, _take_fwd
from dit_sparse.kernels._longest_first import _longest_first_fwd
from dit_sparse.kernels._permute import _permute_blocks, _permute_rows
from dit_sparse.kernels._pool import _covariance_fwd, _means_fwd
from dit_sparse.kernels._pooled import _pooled_tiles_fwd
from dit_sparse.kernels._pooled_again import _pooled_again_fwd
from dit_sparse.kernels._portable import _portable_fwd
from dit_sparse.kernels._quantise import (
    _centres_fwd,
    _extremes_fwd,
    _quantise_rows_fwd,
    _quantise_values_fwd,
)
from dit_sparse.kernels._summaries import _summaries_fwd
from dit_sparse.kernels._tail import _tail_bias_fwd, _tail_fwd
from dit_sparse.kernels.attention_map import tile as map_tile
from dit_sparse.kernels.dealt import START
from dit_sparse.kernels.dealt import WARPS as DEAL_WARPS
from dit_sparse.kernels.longest_first import BUCKETS
from dit_sparse.kernels.tail import choose_tile as tail_tile
from dit_sparse.kernels.tiles import choose_tile
from dit_sparse.mask_product import COLUMNS
from scripts import amd_variants, compile_gluon
from scripts.machine_code import K_BLOCK, Q_BLOCK, Report, Variant, report_of, source_of


def variants(every: bool) -> Iterator[Variant]:
    """The kernels for exact entries, as launches ask for them.

    Args:
        every: all combinations; otherwise each of their kinds.
    """
    for head_dim in (64, 128):
        for ragged in (False, True):
            for bound in (False, True):
                yield Variant("hopper", 90, head_dim, ragged, bound=bound)
        for bound in (False, True):  # blocks of any length: their ends are masked too
            yield Variant("hopper", 90, head_dim, ragged=False, box=True, bound=bound)
        yield Variant("hopper", 90, head_dim, ragged=True, dtype="fp16")
        yield Variant("hopper", 90, head_dim, ragged=True, grouped=True)
        yield from queued_variants(head_dim)
    yield from portable_variants(every)


def queued_variants(head_dim: int) -> Iterator[Variant]:
    """The kernels that begin with the longest rows."""
    for bound in (False, True):
        yield Variant("hopper", 90, head_dim, ragged=True, bound=bound, queued=True)
    for box in (False, True):
        yield Variant("hopper", 90, head_dim, ragged=False, box=box, bound=True, queued=True)
    yield Variant("portable", 80, head_dim, ragged=True, queued=True)


def portable_variants(every: bool) -> Iterator[Variant]:
    """The portable kernel for every architecture that has tiles of its own."""
    for head_dim in (64, 128, 256):
        for capability in (80, 90, 100, 120):
            yield Variant("portable", capability, head_dim, ragged=True)
            if every or head_dim != 64:
                yield Variant("portable", capability, head_dim, ragged=True, box=True)
            if every or (capability < 100 and head_dim == 128):
                yield Variant("portable", capability, head_dim, ragged=True, disk=True)
    for head_dim in (64, 128):
        yield Variant("portable", 90, head_dim, ragged=True, box=True, full=False)
    yield Variant("portable", 90, 128, ragged=True, disk=True, full=False)
    yield Variant("portable", 90, 128, ragged=True, words=True, full=False)
    for masks in ({}, {"box": True}, {"words": True}):  # what the specialised kernel leaves
        yield Variant("portable", 90, 128, ragged=True, biased=True, added=True, **masks)
    for capability in (80, 90, 100, 120) if every else (80, 90):
        yield Variant("portable", capability, 128, ragged=True, words=True, biased=True)
        yield Variant("portable", capability, 128, ragged=True, dtype="fp16")


def approximations(every: bool) -> Iterator[Variant]:
    """The kernels for pooled entries and tails, and for the summaries that they read."""
    for head_dim in (64, 128):
        for capability in (80, 90, 100, 120) if every else (80, 90):
            yield Variant("means", capability, head_dim, ragged=True)
            for hidden in (False, True) if head_dim == 128 else (False,):
                for ragged in (False, True) if head_dim == 128 else (True,):
                    yield Variant("importance", capability, head_dim, ragged, hidden=hidden)
            yield Variant("take", capability, head_dim, ragged=True)
            yield Variant("choose", capability, head_dim, ragged=True)
            yield Variant("longest_first", capability, head_dim, ragged=True)
            yield Variant("covariance", capability, head_dim, ragged=True)
            for rows in (pooled.ROWS, pooled.ROWS_IN_GLUON):
                yield Variant("pooled_tiles", capability, head_dim, ragged=True, block=rows)
            yield Variant("permute_blocks", capability, head_dim, ragged=True)
            yield Variant("permute_blocks", capability, head_dim, ragged=True, hidden=True)
            for hidden in (False, True):
                yield Variant("summaries", capability, head_dim, ragged=True, hidden=hidden)
            for tail in range(4):
                yield Variant("approximate", capability, head_dim, ragged=True, tail=tail)
    yield Variant("deal", 90, 128, ragged=True)


#: Of a tile of those that have not 64.
_ROWS = {
    **dict.fromkeys(("importance", "longest_first"), 128),
    **dict.fromkeys(("permute_blocks", "summaries"), 32),
}


def approximation(variant: Variant) -> Report:
    """Compiles one of `approximations` as its launcher would."""
    dim, rows = variant.head_dim, _ROWS.get(variant.kernel) or min(variant.block, 64)
    functions = {
        "means": (_means_fwd, 4),
        "importance": (_importance_fwd, 8),
        "take": (_take_fwd, 4),
        "choose": (_choose_fwd, 4),
        "deal": (_deal_fwd, DEAL_WARPS),
        "longest_first": (_longest_first_fwd, 8),
        "covariance": (_covariance_fwd, 8 if dim > 64 else 4),
        "pooled_tiles": (_pooled_tiles_fwd, 1),
        "permute_blocks": (_permute_blocks, 4),
        "permute_rows": (_permute_rows, 4),
        "summaries": (_summaries_fwd, 2),
        "approximate": (_approximate_fwd, 8),
    }
    function, warps = functions[variant.kernel]
    constants = {"D": dim, "DV": dim, "BLOCK_D": dim, "BLOCK_DV": dim, "BLOCK_M": Q_BLOCK}
    constants |= {"BLOCK_N": 64, "PARTS": 1, "BLOCK": 64, "CHUNK": 64, "COLUMNS": 64}
    constants |= {"SIZE": K_BLOCK, "LOG_SIZE": 7, "FACTORS": 14, "N_FACTORS": 3}
    constants |= {"WIDTH": 1024, "N_LEVELS": 4, "BY_MASS": False, "VISITED": True}
    constants |= {"COUNT": 32, "SOFTMAX": True, "BUCKETS": BUCKETS, "BOTH": True}
    constants |= {"START": START} | ({"WIDTH": 256} if variant.kernel == "deal" else {})
    constants |= {"ROWS": rows, "PER_ENTRY": K_BLOCK // 2 // rows, "SUB": K_BLOCK // 64}
    constants |= {"TAIL": variant.tail, "MEANS": True, "HAS_ORDER": variant.order}
    constants |= {"LEAST": 32, "MOVE": True, "SKIPPED": 0, "NORMS": True}
    constants |= {"HAS_HIDDEN": variant.hidden, "HAS_CENTRE": False, "SUM": True, "SQUARES": True}
    constants |= {"RAGGED": variant.ragged, "EACH": False, "CENTRES": True}
    tma = isinstance(variant.capability, int) and variant.capability >= 90
    constants |= {"TMA": tma, "WHOLE": not variant.ragged, "VALUES": True}
    stages, registers = 2 if variant.tail else 3, None
    if variant.kernel == "importance":
        stages, constants["CHUNK"] = importance.STAGES, importance.CHUNK
        registers = importance.REGISTERS if variant.capability == 90 else None
    if variant.kernel == "approximate" and isinstance(variant.capability, str):
        constants, warps, stages = amd_variants.of_approximate(constants)
    others = {"means_ptr": "*bf16"} if variant.kernel in ("permute_blocks", "summaries") else {}
    if variant.kernel == "importance" and tma:
        others["k_ptr"] = f"tensordesc<bf16[64, {dim}]>"
    source = source_of(function, constants, {}, others)
    return report_of(variant, source, warps, stages, registers)


def with_means() -> Iterator[Variant]:
    """The kernels that read means of keys through descriptors."""
    for head_dim in (64, 128):
        for tail in (1, 2):
            yield Variant("tail", 90, head_dim, ragged=True, tail=tail)
            yield Variant("tail", 90, head_dim, ragged=True, tail=tail, order=False)
        for ragged in (False, True):
            for bound in (False, True):
                yield Variant("pooled", 90, head_dim, ragged, bound=bound)
            for rows in (pooled.ROWS, pooled.ROWS_IN_GLUON):
                yield Variant("pooled_again", 90, head_dim, ragged, block=rows)
    for hidden in (False, True):
        yield Variant("tail_bias", 90, 128, ragged=True, hidden=hidden)


def means(variant: Variant) -> Report:
    """Compiles one of `with_means` as its launcher would."""
    dim, keys, sloped = variant.head_dim, pooled.ROWS, variant.tail > 1
    constants = {"D": dim, "BLOCK_D": dim, "BLOCK_M": Q_BLOCK, "BLOCK_N": keys}
    constants |= {"HAS_ORDER": variant.order, "HAS_HIDDEN": variant.hidden, "SLOPE": sloped}
    if variant.kernel == "tail_bias":
        source = source_of(_tail_bias_fwd, constants | {"BLOCK": 512}, {})
        return report_of(variant, source, 4, 1)
    if variant.kernel == "tail":
        tile = tail_tile(dim)
        described = {
            "means_desc": f"tensordesc<bf16[1, {tile.means}, {dim}]>",
            "bias_desc": f"tensordesc<fp32[1, {tile.means}]>",
            "slope_desc": f"tensordesc<bf16[1, {dim}, {dim}]>",
        }
        constants |= {"BLOCK_N": tile.means} | ({} if sloped else {"slope_desc": None})
        source = source_of(_tail_fwd, constants, described)
        return report_of(variant, source, tile.warps, tile.stages, tile.registers)
    constants |= {"ROWS": keys, "LOG_SIZE": 7, "LOG_ROWS": 5, "RAGGED": variant.ragged}
    constants |= {"HELD": pooled.HELD, "BOUND": variant.bound}
    if variant.kernel == "pooled_again":
        again = constants | {"EACH": pooled.EACH, "ROWS": variant.block}
        again |= {"LOG_ROWS": variant.block.bit_length() - 1}
        return report_of(variant, source_of(_pooled_again_fwd, again, {}), 8, 2)
    described = dict.fromkeys(("k_desc", "v_desc"), f"tensordesc<bf16[{keys}, {dim}]>")
    source = source_of(_pooled_fwd_hopper, constants, described)
    return report_of(variant, source, 4, pooled.STAGES)


def in_eight_bits() -> Iterator[Variant]:
    """The kernels in 8 bits, and the pass that quantises for them; ragged extremes have hidden
    keys."""
    for precision in ("fp8", "int8"):
        for queued in (False, True):
            for ragged in (False, True):
                yield Variant(precision, 90, 128, ragged, queued=queued)
            yield Variant(precision, 90, 128, ragged=True, box=True, queued=queued)
        yield Variant(f"keys {precision}", 90, 128, ragged=True)
        yield Variant(f"queries {precision}", 90, 128, ragged=True)
    for hidden in (False, True):
        yield Variant("extremes", 90, 128, ragged=hidden)
    for hidden in (False, True):
        yield Variant("values", 90, 128, ragged=hidden)
    yield Variant("centres", 90, 128, ragged=True)


def eight_bits(variant: Variant) -> Report:
    """Compiles one of `in_eight_bits` as its launcher would."""
    dim, integers = variant.head_dim, variant.kernel.endswith("int8")
    attends = variant.kernel in ("fp8", "int8")
    functions = {
        "extremes": (_extremes_fwd, quantise._WARPS),
        "centres": (_centres_fwd, 4),
        "values": (_quantise_values_fwd, 8),
    }
    function, warps = functions.get(variant.kernel, (_quantise_rows_fwd, 8))
    if attends:
        function, warps = _quantised_fwd_hopper, 4
    constants = {"D": dim, "DV": dim, "BLOCK_D": dim, "BLOCK_M": Q_BLOCK, "BLOCK_N": K_BLOCK}
    constants |= {"ROWS": quantise._ROWS if variant.kernel == "extremes" else 32}
    constants |= {"SIZE": K_BLOCK, "EVERY": 8, "CHUNKS": 64, "VALUES": True}
    constants |= {"RAGGED": variant.ragged, "PARTIAL": variant.box, "HAS_ORDER": variant.order}
    constants |= {"STAGES": 3, "KEYS": variant.kernel.startswith("keys")}
    constants |= {"SAMPLED": True, "AGAIN": False}
    constants |= {"INTEGERS": integers, "V_8BIT": not integers, "HAS_HIDDEN": variant.ragged}
    constants |= {"FRESH": not integers and not variant.box, "QUEUED": variant.queued}
    element = "i8" if integers else "fp8e4nv"
    descriptors = {"k_desc": f"tensordesc<{element}[{K_BLOCK}, {dim}]>"}
    descriptors["v_desc"] = f"tensordesc<{'bf16' if integers else 'fp8e4nv'}[{K_BLOCK}, {dim}]>"
    if not variant.box:
        constants |= {"above_desc": None, "below_desc": None}
    pointers = {"q_ptr": f"*{element}"} if attends else {"x_ptr": "*bf16", "k_ptr": "*bf16"}
    if not attends:
        pointers["out_ptr"] = f"*{element}"
    source = source_of(function, constants, descriptors, pointers)
    return report_of(variant, source, warps, 2)


def maps(every: bool) -> Iterator[Variant]:
    """The kernel for a calibration's statistics, with blocks of both sizes that PARO takes."""
    for capability in (80, 90, 100, 120) if every else (80, 90):
        for head_dim in (64, 128) if every else (128,):
            for block in (64, 128):
                for hidden in (False, True):
                    yield Variant("map", capability, head_dim, ragged=hidden, block=block)


def statistics(variant: Variant) -> Report:
    """Compiles one of `maps` as its launcher would; ragged ones have hidden blocks."""
    dim = variant.head_dim
    rows, columns = map_tile(variant.block, dim, 2)
    constants = {"D": dim, "BLOCK_D": dim, "BLOCK_M": rows, "BLOCK_N": columns}
    constants |= {"SUB": variant.block // columns, "HAS_HIDDEN": variant.ragged}
    source = source_of(_attention_map_fwd, constants, {})
    return report_of(variant, source, 8 if rows == 128 else 4, 2)


def compiled(variant: Variant) -> Report:
    """Compiles a variant as its launcher would."""
    masked = variant.box or variant.disk or variant.words
    queries = Q_BLOCK
    if variant.kernel == "hopper":
        function, warps, stages, tma, keys = _block_sparse_fwd_hopper, 4, 2, True, K_BLOCK
        tile = [keys, variant.head_dim]
    else:
        function = _portable_fwd
        sizes = (variant.head_dim, 4 if variant.dtype == "fp32" else 2, Q_BLOCK, K_BLOCK)
        boxed = masked or variant.biased
        chosen = choose_tile(variant.architecture, *sizes, boxed=boxed)
        assert chosen is not None, variant
        warps, stages, keys, tma = chosen.warps, chosen.stages, chosen.keys, chosen.tma
        queries = chosen.queries
        tile = [1, 1, keys, variant.head_dim]
    constants = dict.fromkeys(("D", "DV", "BLOCK_D", "BLOCK_DV"), variant.head_dim) | {
        "BLOCK_M": queries,
        "PARTS": Q_BLOCK // queries,
        "BLOCK_N": keys,
        "SUB": K_BLOCK // keys,
        "FULL": variant.full,
        "ADD": variant.added or not variant.full,
        "RAGGED": variant.ragged,
        "HAS_BOX": masked,
        "DISK": variant.disk,
        "HAS_ORDER": variant.order,
        "TMA": tma,
        "COLUMNS": COLUMNS if variant.box else 0,
        "BOUND": variant.bound,
        "HAS_WORDS": variant.words,
        "HAS_BIAS": variant.biased,
        "REPAIR": False,
        "QUEUED": variant.queued,
    }
    constants |= {} if variant.box else {"hidden_desc": None}
    constants |= {} if variant.grouped else {"group": 1}  # Triton takes a 1 for a constant
    described = dict.fromkeys(("k_desc", "v_desc"), f"tensordesc<{variant.dtype}{tile}>")
    halves = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{variant.dtype}")
    others = halves | ({"bias_ptr": "*fp32"} if variant.biased else {})
    source = source_of(function, constants, described if tma else {}, others)
    return report_of(variant, source, warps, stages)


def chosen(
    every: bool, only: Sequence[str], amd: bool = False
) -> Iterator[tuple[Callable[[Variant], Report], Variant]]:
    """What to compile, and how.

    Args:
        every: all combinations; otherwise one of those that differ in little.
        only: names of kernels; empty for all of them.
        amd: for AMD's GPUs, otherwise for NVIDIA's.
    """
    for_amd = (amd_variants.portable, amd_variants.approximations, amd_variants.maps)
    of_amd = zip((compiled, approximation, statistics), (x(every) for x in for_amd), strict=True)
    of_nvidia = (
        (compiled, variants(every)),
        (compile_gluon.gluon, compile_gluon.in_gluon(every)),
        (approximation, approximations(every)),
        (means, with_means()),
        (eight_bits, in_eight_bits()),
        (statistics, maps(every)),
    )
    for how, several in of_amd if amd else of_nvidia:
        for variant in several:
            if not only or variant.kernel in only:
                yield how, variant


def _reported(task: tuple[Callable[[Variant], Report], Variant]) -> Report:
    return task[0](task[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--all", action="store_true", help="every combination; takes minutes")
    parser.add_argument("--only", nargs="+", default=(), help="names of kernels")
    parser.add_argument("--amd", action="store_true", help="for AMD's GPUs, not NVIDIA's")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        reports = list(pool.map(_reported, chosen(arguments.all, arguments.only, arguments.amd)))
    if arguments.format == "json":
        print(json.dumps([asdict(report) for report in reports]))
        return
    print("Triton", triton.__version__)
    for report in reports:
        print(report.variant, report.registers, "registers", report.shared, "B", report.counts)
        if report.flaw and report.counts["setmaxreg"]:
            print("  refused where it has to be specialised:", report.flaw)


if __name__ == "__main__":
    main()
