"""What the compiler makes of the kernels, read in machine code: no GPU is needed."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dit_sparse.kernels.hopper_gluon import TRITON
from dit_sparse.kernels.tiles import choose_tile, shared_memory
from scripts.machine_code import _inner_spills

triton = pytest.importorskip("triton")
VERSION = triton.__version__.split(".")[:2]
if tuple(int(part) for part in VERSION) < (3, 6):
    pytest.skip("the Hopper kernel is for Triton 3.6 and later", allow_module_level=True)
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "compile_kernels.py"


# A folder with another version of Triton, whose kernel in Gluon is then checked too.
ANOTHER = os.environ.get("DIT_SPARSE_ANOTHER_TRITON")


def compiled(*arguments: str, triton: str | None = None) -> list[dict[str, Any]]:
    """In a process of its own, since this one runs Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if triton is not None:
        path = (triton, environment.get("PYTHONPATH"))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), "--format", "json", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return compiled()


def chosen(reports: list[dict[str, Any]], kernel: str, capability: int) -> list[dict[str, Any]]:
    found = [
        r
        for r in reports
        if (r["variant"]["kernel"], r["variant"]["capability"]) == (kernel, capability)
    ]
    assert found
    return found


LOOPS = """
/*0000*/ NOP ;
/*0010*/ NOP ;
/*0020*/ NOP ;
/*0030*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
/*0040*/ @P0 BRA 0x20 ;
/*0050*/ @!P1 BRA 0x50 ;
/*0060*/ @P2 BRA 0x10 ;
"""


@pytest.mark.parametrize(("place", "spills"), [("0000", 0), ("0010", 0), ("0020", 1)])
def test_accesses_to_local_memory_are_counted_in_inner_loops(place: str, spills: int):
    code = LOOPS.replace(f"/*{place}*/ NOP ;", f"/*{place}*/ LDL R0, [R1] ;")
    assert code != LOOPS
    assert _inner_spills(code) == spills


def test_the_hopper_kernel_is_specialised_asynchronous_and_free_of_spills(reports):
    for report in chosen(reports, "hopper", 90):
        check_hopper(report)


def check_hopper(report: dict[str, Any]) -> None:
    counts = report["counts"]
    assert report["flaw"] is None, report
    assert counts["spills"] == 0, report
    assert counts["tma"] > 0, report
    assert counts["setmaxreg"] > 0, report  # warp specialisation
    assert counts["stale"] == 0, report  # barriers whose place is used again
    # Products are not serialised.
    masked = report["variant"]["box"]
    assert counts["qgmma"] == (2 if masked else 0), report  # one for each warpgroup
    # The mask's product is waited for by itself.
    assert counts["hgmma"] >= 6 * (counts["waits"] - 2 * masked) > 0, report
    # Of 64, or half as many, in the softmax of each of two warpgroups.
    assert counts["overlapped"] >= 80, report
    assert report["shared"] <= 232_448, report


HERE = triton.__version__.startswith(TRITON + ".")
IN_GLUON = pytest.mark.skipif(
    ANOTHER is None and not HERE,
    reason=f"not Triton {TRITON}, and DIT_SPARSE_ANOTHER_TRITON names no folder",
)


@IN_GLUON
def test_the_kernel_in_gluon_is_specialised_asynchronous_and_leaves_no_barrier_behind():
    found = compiled("--only", "hopper_gluon", triton=None if HERE else ANOTHER)
    assert {r["variant"]["head_dim"] for r in found} == {64, 128}
    for name in ("box", "biased", "words"):
        assert {r["variant"][name] for r in found} == {False, True}
    for report in found:
        counts, variant = report["counts"], report["variant"]
        assert report["flaw"] is None, report
        # Some numbers of a query block, once for each, where ends of short blocks are hidden too;
        # with a mask of the warp that loads, which has time. None in the loops over key blocks.
        assert counts["inner_spills"] == 0, report
        words = variant["ragged"] and variant["words"]
        few = 36 if words else 12 if variant["ragged"] or variant["box"] else 0
        assert counts["spills"] <= few, report
        assert counts["tma"] > 0, report
        assert counts["setmaxreg"] > 0, report
        assert counts["stale"] == 0, report
        assert counts["hasty"] == 0, report
        assert counts["hgmma"] >= 4 * counts["waits"] > 0, report
        # All of the loop and of the next query block's first, in both warpgroups.
        assert counts["overlapped"] >= 4 * 60, report
        assert report["shared"] <= 232_448, report


@IN_GLUON
def test_the_kernel_in_gluon_for_pooled_entries_multiplies_blocks_of_any_tiles():
    found = compiled("--only", "pooled_gluon", triton=None if HERE else ANOTHER)
    names = ("head_dim", "ragged", "bound", "order")
    cases = {tuple(r["variant"][name] for name in names) for r in found}
    assert cases == set(itertools.product((64, 128), *3 * [(False, True)]))
    for report in found:
        counts, dim = report["counts"], report["variant"]["head_dim"]
        assert report["flaw"] is None, report
        # Once for a query block, and some of the warp that fetches; none in loops that multiply.
        assert counts["inner_spills"] == 0, report
        assert counts["spills"] <= (60 if dim == 128 else 0), report
        # Per step products with 128 keys, as of exact entries: small tiles cost no more of them.
        assert counts["hgmma"] == 2 * (3 * dim // 16 + 2 * 8), report
        assert counts["tma"] == 2 * dim // 64 * (1 + 2 * 8), report
        assert counts["setmaxreg"] > 0, report
        assert counts["stale"] == counts["hasty"] == 0, report
        assert counts["overlapped"] >= 4 * 60, report
        assert report["shared"] <= 232_448, report


def test_the_kernel_for_pooled_entries_is_specialised_and_free_of_spills(reports):
    for report in chosen(reports, "pooled", 90):
        counts = report["counts"]
        assert report["flaw"] is None, report
        assert counts["spills"] == 0, report
        assert counts["tma"] > 0, report
        assert counts["setmaxreg"] > 0, report  # warp specialisation
        assert counts["stale"] == 0, report
        assert counts["hgmma"] >= 2 * counts["waits"] > 0, report
        # Values are multiplied while the next weights are computed, 64 in each of two warpgroups.
        assert counts["overlapped"] >= 50, report
        assert report["shared"] <= 232_448, report
    for report in chosen(reports, "pooled_again", 90):
        assert report["counts"]["spills"] == 0, report
        assert report["counts"]["hgmma"] > 0, report


def test_two_programs_for_a_tail_of_means_share_a_multiprocessor(reports):
    for report in chosen(reports, "tail", 90):
        counts = report["counts"]
        assert counts["tma"] > 0, report
        assert counts["hgmma"] >= 3 * counts["waits"] > 0, report  # products are not serialised
        assert counts["spills"] <= 16, report  # before and behind the loop
        assert report["shared"] <= 115_712, report
        assert report["registers"] <= 128, report


def test_the_portable_kernel_uses_the_matrix_units_and_descriptors_of_hopper(reports):
    for report in chosen(reports, "portable", 90):
        counts = report["counts"]
        assert counts["hgmma"] > 0, report
        assert counts["tma"] > 0, report
        # Measured: still the fastest of its tiles.
        assert counts["spills"] <= 80, report


@pytest.mark.parametrize(("capability", "dims"), [(80, {64, 128, 256}), (120, {64, 128, 256})])
def test_the_portable_kernel_fits_gpus_of_99_kib(reports, capability: int, dims: set[int]):
    """sm_86, sm_89 and sm_120 have no more shared memory, and no matrix units but these."""
    found = chosen(reports, "portable", capability)
    assert {report["variant"]["head_dim"] for report in found} == dims
    for report in found:
        counts = report["counts"]
        assert counts["mma"] > 0, report
        assert counts["spills"] <= 2, report
        assert report["shared"] <= 101_376, report


def test_the_portable_kernel_uses_the_matrix_units_of_datacentre_blackwell(reports):
    found = chosen(reports, "portable", 100)
    assert {report["variant"]["head_dim"] for report in found} == {64, 128, 256}
    for report in found:
        counts = report["counts"]
        assert counts["utcmma"] > 0, report
        assert counts["tma"] > 0, report
        assert counts["spills"] <= 2, report
        assert report["shared"] <= 232_448, report


def test_words_biases_and_float16_are_compiled(reports):
    for capability in (80, 90):
        found = [r["variant"] for r in chosen(reports, "portable", capability)]
        assert any(v["words"] and v["biased"] for v in found)
        assert any(v["dtype"] == "fp16" for v in found)
    assert any(v["biased"] and v["added"] for v in found)
    assert any(r["variant"]["dtype"] == "fp16" for r in chosen(reports, "hopper", 90))


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_the_portable_kernel_takes_no_more_shared_memory_than_is_counted(reports, capability: int):
    for report in chosen(reports, "portable", capability):
        variant = report["variant"]
        dim = variant["head_dim"]
        boxed = any(variant[name] for name in ("box", "disk", "words", "biased"))
        tile = choose_tile(f"sm_{capability}", dim, 2, 128, 128, boxed=boxed)
        assert tile is not None
        assert report["shared"] <= shared_memory(tile, dim, 2, 128), report


@pytest.mark.parametrize("capability", [80, 90])
def test_pooled_entries_and_tails_use_the_matrix_units(reports, capability: int):
    for kernel in ("approximate", "covariance", "importance"):
        for report in chosen(reports, kernel, capability):
            counts = report["counts"]
            assert counts["hgmma" if capability == 90 else "mma"] > 0, report
            assert counts["spills"] <= 64, report  # outside the loops' products
            assert report["shared"] <= (232_448 if capability == 90 else 101_376), report


def test_three_programs_that_sample_share_a_multiprocessor(reports):
    found = chosen(reports, "importance", 90)
    assert {(r["variant"]["ragged"], r["variant"]["hidden"]) for r in found} == set(
        itertools.product((False, True), repeat=2)
    )
    for report in found:
        assert report["registers"] * 3 * 256 <= 65_536, report
        assert report["shared"] * 3 <= 232_448, report
        if not report["variant"]["hidden"]:
            assert report["counts"]["inner_spills"] == 0, report


@pytest.mark.parametrize("capability", [80, 90])
def test_means_and_choices_take_no_local_memory(reports, capability: int):
    for kernel in ("means", "take", "choose", "pooled_tiles", "permute_blocks", "summaries"):
        for report in chosen(reports, kernel, capability):
            assert report["counts"]["spills"] == 0, report


def test_dealing_takes_no_local_memory(reports):
    for report in chosen(reports, "deal", 90):
        assert report["counts"]["spills"] == 0, report


def test_biases_of_means_take_no_local_memory(reports):
    for report in chosen(reports, "tail_bias", 90):
        assert report["counts"]["spills"] == 0, report


def test_the_8_bit_kernel_is_specialised_and_multiplies_in_8_bits(reports):
    for precision, eight in (("fp8", "qgmma"), ("int8", "igmma")):
        found = chosen(reports, precision, 90)
        assert {report["variant"]["queued"] for report in found} == {False, True}
        for report in found:
            counts, box = report["counts"], report["variant"]["box"]
            assert report["flaw"] is None, report
            assert counts[eight] > 0, report
            assert counts["tma"] > 0, report
            assert counts["setmaxreg"] > 0, report  # warp specialisation
            assert counts["stale"] == 0, report
            assert counts["hgmma"] >= 4 * counts["waits"] > 0, report
            # Sums of a block's values apart leave few registers, and a short block even fewer.
            apart = precision == "fp8" and not box
            assert counts["spills"] <= (32 if apart else 0), report
            assert apart or counts["overlapped"] >= 80, report
            assert report["shared"] <= 232_448, report


def test_quantising_takes_no_local_memory(reports):
    rows = (f"{what} {precision}" for what in ("keys", "queries") for precision in ("fp8", "int8"))
    for kernel in (*rows, "values", "extremes", "centres"):
        for report in chosen(reports, kernel, 90):
            assert report["counts"]["spills"] == 0, report


@pytest.mark.parametrize("capability", [80, 90])
def test_statistics_of_maps_use_the_matrix_units_without_spills(reports, capability: int):
    for report in chosen(reports, "map", capability):
        counts = report["counts"]
        assert counts["hgmma" if capability == 90 else "mma"] > 0, report
        assert counts["spills"] == 0, report
        assert report["shared"] <= 101_376, report


@pytest.fixture(scope="module")
def amd_reports() -> list[dict[str, Any]]:
    return compiled("--amd")


@pytest.mark.parametrize("gpu", ["gfx942", "gfx90a", "gfx1100"])
def test_the_portable_kernel_uses_the_matrix_units_of_amd(amd_reports, gpu: str):
    for report in chosen(amd_reports, "portable", gpu):
        counts, variant = report["counts"], report["variant"]
        size = 4 if variant["dtype"] == "fp32" else 2
        if gpu != "gfx1100":
            assert counts["mfma"] > 0, report
            assert counts["spills"] == counts["scratch"] == 0, report
        else:
            assert (counts["wmma"] > 0) == (size == 2), report  # there is none of 32 bits
            # Triton 3.9 keeps some where entries of head dim 128 are masked.
            assert counts["spills"] <= (16 if variant["head_dim"] == 128 else 0), report
        boxed = any(variant[name] for name in ("box", "disk", "words", "biased"))
        tile = choose_tile(gpu, variant["head_dim"], size, 128, 128, boxed=boxed)
        assert tile is not None
        counted = shared_memory(tile, variant["head_dim"], size, 128, amd=True)
        assert report["shared"] <= counted <= 65_536, report


@pytest.mark.parametrize("gpu", ["gfx942", "gfx90a"])
def test_approximations_use_the_matrix_units_of_amd(amd_reports, gpu: str):
    for report in chosen(amd_reports, "approximate", gpu):
        counts = report["counts"]
        assert counts["mfma"] > 0, report
        assert counts["spills"] == counts["scratch"] == 0, report
        assert report["shared"] <= 65_536, report


@pytest.mark.parametrize("gpu", ["gfx942", "gfx90a", "gfx1100"])
def test_whatever_launches_on_amd_fits_its_shared_memory(amd_reports, gpu: str):
    found = [report for report in amd_reports if report["variant"]["capability"] == gpu]
    assert len({report["variant"]["kernel"] for report in found}) == 10
    assert all(report["shared"] <= 65_536 for report in found)
