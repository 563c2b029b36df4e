"""The tuner's table: what it makes of measurements and of variants that fail or never end."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from dit_sparse.kernels.variants import Table, table
from scripts.tune_kernels import Trial, merged, row_of, text_of, trials, tried

KEY = Trial("portable", "bfloat16", 64, False)
MADE = {"device": "NVIDIA H200", "date": "2026-11-22"}


def process(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_variant_tells_its_time():
    assert tried(process("print('a line before'); print(1.25)"), 60) == 1.25
    assert tried(process("print('\"no\"')"), 60) == "no"


def test_a_variant_that_does_not_end_is_refused():
    assert tried(process("import time; time.sleep(600)"), 0.5) == "did not end within 0.5 s"


def test_a_variant_that_fails_is_refused():
    assert tried(process("raise ValueError('odd')"), 60) == "failed: ValueError: odd"
    assert tried(process("raise SystemExit(3)"), 60) == "failed: exit status 3"


def test_the_fastest_is_chosen_among_those_that_ran():
    seen = {"hopper": 2.0, "hopper_persistent": "did not end within 90 s", "portable": 3.0}
    row = row_of(KEY, seen, "sm_90", "3.6")
    assert (row.kernel, row.source, row.trials) == ("hopper", "measured", seen)
    assert row_of(KEY, seen | {"hopper_persistent": 1.9}, "sm_90", "3.6").kernel == (
        "hopper_persistent"
    )


def test_nothing_is_chosen_when_nothing_ran():
    with pytest.raises(RuntimeError, match="Expected some kernel to run bfloat16 with a head dim"):
        row_of(KEY, {"portable": "failed: odd"}, "sm_90", "3.6")


def test_rows_for_other_problems_stay():
    before = table()
    old = before.whole[0]
    mended = replace(old, source="measured", trials={"hopper": 1.0}, kernel="hopper")
    other = replace(mended, architecture="sm_120")
    after = merged(before, [mended, other], MADE)
    assert set(map(str, after.whole)) == set(map(str, (*before.whole[1:], mended, other)))
    assert after.tiles == before.tiles
    assert after.provenance["sm_120, Triton 3.6"] == MADE
    assert after.provenance.items() >= before.provenance.items()


def test_the_text_is_the_table():
    text = text_of(table())
    assert Table.of(json.loads(text)) == table()
    assert max(map(len, text.splitlines())) < 400


def test_every_variant_is_tried_on_every_kind_of_problem():
    found = list(trials(["bfloat16"]))
    assert len(found) == len(set(found)) == 3 * 2 * 2
    with_rows = {(row.dtype, row.head_dim, row.ragged) for row in table().whole}
    assert {(t.dtype, t.head_dim, t.ragged) for t in trials(["bfloat16", "float16"])} == with_rows
