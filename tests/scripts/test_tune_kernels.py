"""The tuner's table: what it makes of measurements and of variants that fail or never end."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from dit_sparse.kernels.variants import Masked, Table, table
from scripts import tune_kernels
from scripts.tune_kernels import (
    DTYPES,
    Trial,
    in_processes,
    merged,
    row_of,
    rows_of,
    summed,
    text_of,
    trials,
    tried,
)

KEY = Trial("portable", "bfloat16", 64, False)
MASKED = list(trials(DTYPES, masked=True))
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
    seen = {"hopper": 2.0, "hopper_gluon": "did not end within 90 s", "portable": 3.0}
    row = row_of(KEY, seen, "sm_90", "3.6")
    assert (row.kernel, row.source, row.trials) == ("hopper", "measured", seen)
    assert row_of(KEY, seen | {"hopper_gluon": 1.9}, "sm_90", "3.6").kernel == "hopper_gluon"


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
    ours = {"sm_90, Triton 3.6", "sm_120, Triton 3.6"}
    assert {name: what for name, what in after.provenance.items() if name not in ours} == {
        name: what for name, what in before.provenance.items() if name not in ours
    }


def test_a_choice_stays_where_no_other_is_clearly_faster():
    old = replace(table().whole[0], kernel="hopper")

    def chosen(**trials):
        best = min(trials, key=lambda name: trials[name] if trials[name] != "no" else 9.0)
        row = replace(old, kernel=best, source="measured", trials=trials)
        (found,) = merged(replace(table(), whole=(old,)), [row], MADE).whole
        assert (found.source, found.trials) == ("measured", trials)
        return found.kernel

    assert chosen(hopper=1.04, hopper_gluon=1.0) == "hopper"
    assert chosen(hopper=1.06, hopper_gluon=1.0) == "hopper_gluon"
    assert chosen(hopper="no", hopper_gluon=1.0) == "hopper_gluon"
    assert chosen(hopper_gluon=1.0) == "hopper_gluon"


def test_the_text_is_the_table():
    text = text_of(table())
    assert Table.of(json.loads(text)) == table()
    assert max(map(len, text.splitlines())) < 400


@pytest.mark.parametrize("hopper", [1.5, "hopper, bounds: NaN in 3 of 50 runs"])
def test_masked_rows_replace_those_of_the_same_gpu_and_version(hopper: float | str):
    before = table()
    found = dict.fromkeys(MASKED, 2.0) | {MASKED[0]: hopper}
    (row,) = rows_of(found, "sm_90", "3.6")
    after = merged(before, [row], MADE)
    assert row in after.masked
    assert len(after.masked) == len(before.masked)
    assert set(map(str, after.masked)) - {str(row)} < set(map(str, before.masked))
    assert (after.whole, after.tiles) == (before.whole, before.tiles)
    assert after.provenance["sm_90, Triton 3.6, masked entries"] == MADE
    assert Table.of(json.loads(text_of(after))) == after
    assert max(map(len, text_of(after).splitlines())) < 400
    new = replace(row, triton="3.7")
    assert len(merged(after, [new], MADE).masked) == len(before.masked) + 1


def test_both_kinds_of_rows_are_made_of_one_run():
    found = dict.fromkeys(trials(DTYPES), 1.0) | dict.fromkeys(MASKED, 2.0)
    rows = rows_of(found, "sm_90", "3.6")
    assert len(rows) == len(DTYPES) * 2 * 2 + 1
    assert [row for row in rows if isinstance(row, Masked)] == rows[-1:]
    assert {len(row.trials) for row in rows[:-1]} == {3}


def test_the_product_masks_where_it_is_faster_in_all():
    times = {trial: 1.0 if trial.kernel == "hopper" else 2.0 for trial in MASKED}
    (row,) = rows_of(times, "sm_90", "3.6")
    assert (row.kernel, row.source) == ("hopper", "measured")
    assert row.trials == {"hopper": 8.0, "portable": 16.0}
    (row,) = rows_of(times | {MASKED[0]: 20.0}, "sm_90", "3.6")
    assert row.kernel == "portable"


def test_one_refusal_of_the_product_leaves_the_portable_kernel():
    times: dict[Trial, float | str] = {t: 1.0 if t.kernel == "hopper" else 2.0 for t in MASKED}
    last = max(n for n, trial in enumerate(MASKED) if trial.kernel == "hopper")
    times[MASKED[last]] = "hopper, bounds: NaN in 3 of 50 runs"
    (row,) = rows_of(times, "sm_90", "3.6")
    assert row.kernel == "portable"
    assert row.trials["hopper"] == (
        "float16, head dim 128, short blocks: hopper, bounds: NaN in 3 of 50 runs"
    )
    refused = dict.fromkeys(MASKED, "did not end within 90 s")
    with pytest.raises(RuntimeError, match="Expected some kernel to run masked entries, got"):
        rows_of(refused, "sm_90", "3.6")


def test_after_a_refusal_no_more_masks_are_tried(monkeypatch: pytest.MonkeyPatch):
    seen: list[Trial] = []

    def fake(command: list[str], seconds: float) -> float | str:
        seen.append(Trial(**json.loads(command[-1])))
        wrong = seen[-1].kernel == "hopper" and seen[-1].head_dim == 128
        return "NaN" if wrong else 1.0

    monkeypatch.setattr(tune_kernels, "tried", fake)
    found = in_processes(MASKED, 1.0)
    assert list(found) == seen
    assert [t.head_dim for t in seen if t.kernel == "hopper"] == [64, 64, 128]
    assert sum(t.kernel == "portable" for t in seen) == 8
    assert summed({t: took for t, took in found.items() if t.kernel == "portable"}) == 8.0
    seen.clear()
    assert list(in_processes(trials(["bfloat16"]), 1.0)) == list(trials(["bfloat16"]))  # own rows


def test_every_variant_is_tried_on_every_kind_of_problem():
    found = list(trials(["bfloat16"]))
    assert len(found) == len(set(found)) == 3 * 2 * 2
    assert len(MASKED) == len(set(MASKED)) == 2 * 2 * 2 * 2
    with_rows = {(row.dtype, row.head_dim, row.ragged) for row in table().whole}
    assert {(t.dtype, t.head_dim, t.ragged) for t in trials(["bfloat16", "float16"])} == with_rows
