"""The shipped table of kernel variants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from dit_sparse import block_times
from dit_sparse.kernels import variants
from dit_sparse.kernels.variants import (
    Masked,
    Table,
    TileRow,
    Whole,
    masked_kernel,
    tile_row,
    whole_kernel,
)
from scripts.tune_kernels import NOISE

BF16 = ("bfloat16", 64, False)


def test_the_table_survives_its_record():
    table = variants.table()
    again = Table.of(table.record())
    assert again == table
    assert len(table.whole) > 0
    assert len(
        {(r.architecture, r.triton, r.dtype, r.head_dim, r.ragged) for r in table.whole}
    ) == (len(table.whole))


def test_measured_rows_choose_the_fastest_of_their_trials():
    """But for noise, and never a variant that was refused."""
    for row in variants.table().whole:
        times = {name: ms for name, ms in row.trials.items() if not isinstance(ms, str)}
        assert row.kernel not in row.trials or row.kernel in times, row
        if row.source == "measured":
            assert times[row.kernel] <= (1 + NOISE) * min(times.values()), row


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A table with rows for two Triton versions."""
    made = [
        Whole("sm_90", version, *BF16, kernel, "compiled", {})
        for version, kernel in (("3.6", "hopper_gluon"), ("3.10", "hopper"))
    ]
    table = replace(variants.table(), whole=tuple(made))
    monkeypatch.setattr(variants, "table", lambda: table)
    whole_kernel.cache_clear()
    yield
    whole_kernel.cache_clear()


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(
    ("version", "kernel"),
    [
        ("3.5.1", "portable"),
        ("3.6.0", "hopper_gluon"),
        ("3.9.1+cu130", "hopper_gluon"),  # nobody has tried: the version before
        ("3.10.0", "hopper"),
        ("4.0", "hopper"),
    ],
)
def test_versions_without_rows_take_those_before(version: str, kernel: str):
    assert whole_kernel("sm_90", version, *BF16) == kernel


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(
    "key",
    [
        ("sm_100", "3.6.0", *BF16),
        ("sm_80", "3.6.0", *BF16),
        ("sm_90", "3.6.0", "float32", 64, False),
        ("sm_90", "3.6.0", "bfloat16", 256, False),
        ("sm_90", "3.6.0", "bfloat16", 64, True),
    ],
)
def test_what_has_no_row_is_portable(key: tuple[Any, ...]):
    assert whole_kernel(*key) == "portable"


def test_windows_are_chosen_for_the_kernel_that_masks():
    """`block_times` knows no GPU: it says by hand what the table does."""
    chosen = {row.kernel for row in variants.table().masked}
    assert ("hopper" in chosen) == block_times.BY_PRODUCT


def test_rows_of_other_fields_are_refused():
    record = variants.table().record()
    record["whole"] = [{"architecture": "sm_90"}]
    with pytest.raises(ValueError, match=r"Expected rows with .*, got architecture\. Make"):
        Table.of(record)


def test_unknown_kernels_are_refused():
    with pytest.raises(ValueError, match=r"Expected a kernel among hopper, .*, got 'fast'"):
        Whole("sm_90", "3.6", *BF16, "fast", "compiled", {})
    with pytest.raises(ValueError, match=r"among hopper, portable, got 'hopper_gluon'"):
        Masked("sm_90", "3.6", "hopper_gluon", "compiled", {})


def test_masked_rows_never_choose_what_was_refused():
    for row in variants.table().masked:
        assert not isinstance(row.trials.get(row.kernel), str), row


@pytest.mark.parametrize(
    ("architecture", "version", "kernel"),
    [
        ("sm_90", "3.5", "portable"),
        ("sm_90", "3.6.0", "portable"),
        ("sm_90", "3.8", "hopper"),
        ("sm_100", "3.8", "portable"),
    ],
)
def test_masks_of_the_newest_version_that_is_not_newer(
    architecture: str, version: str, kernel: str, monkeypatch: pytest.MonkeyPatch
):
    made = [
        Masked("sm_90", version, kernel, "measured", {})
        for version, kernel in (("3.6", "portable"), ("3.7", "hopper"))
    ]
    table = replace(variants.table(), masked=tuple(made))
    monkeypatch.setattr(variants, "table", lambda: table)
    masked_kernel.cache_clear()
    assert masked_kernel(architecture, version) == kernel
    masked_kernel.cache_clear()


@pytest.mark.parametrize(
    ("architecture", "row"),
    [
        ("cpu", "sm_80"),
        ("sm_80", "sm_80"),
        ("sm_89", "sm_80"),
        ("sm_90", "sm_90"),
        ("sm_100", "sm_100"),
        ("sm_103", "sm_100"),
        ("sm_120", "sm_120"),
        ("sm_121", "sm_120"),
        ("gfx90a", "gfx90a"),
        ("gfx942", "gfx90a"),
        ("gfx950", "gfx90a"),
        ("gfx1100", "gfx1100"),
        ("gfx1201", "gfx1100"),
    ],
)
def test_tiles_of_the_newest_architecture_that_is_not_newer(architecture: str, row: str):
    assert of_tile(architecture, 128).architecture == row


@pytest.mark.parametrize(("head_dim", "row"), [(16, 64), (64, 64), (128, 128), (256, 256)])
def test_tiles_of_the_least_head_dim_that_is_not_less(head_dim: int, row: int):
    assert of_tile("sm_90", head_dim).head_dim == row


def of_tile(architecture: str, head_dim: int) -> TileRow:
    row = tile_row(architecture, 2, head_dim, True)
    assert row is not None
    return row


def test_what_no_tile_of_a_line_is_for_has_none():
    """Not that of GPUs with warps of another size."""
    assert tile_row("gfx1100", 2, 256, False) is None
