"""The folder of an evaluation."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from dit_sparse.evaluation import store as storing
from dit_sparse.evaluation.store import Store, Task


def test_lines_of_all_processes_are_read(tmp_path: Path) -> None:
    for process in (0, 1):
        Store(tmp_path, process).append({"process": process})
    assert Store(tmp_path).lines() == [{"process": 0}, {"process": 1}]


def test_a_line_that_was_cut_short_is_left_out_and_swallows_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append({"n": 1})
    store.append({"n": 2})
    path = tmp_path / "runs-0.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    store.append({"n": 3})
    assert store.lines() == [{"n": 1}, {"n": 3}]


def test_arrays_come_back_and_damaged_ones_do_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.clip_path("window density=0.2", Task("a cat", 3))
    clip = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    assert store.read_array(path) is None
    store.write_array(path, clip)
    np.testing.assert_array_equal(store.read_array(path), clip)
    path.write_bytes(path.read_bytes()[:-1])
    assert store.read_array(path) is None


def test_tasks_have_different_files(tmp_path: Path) -> None:
    store = Store(tmp_path)
    tasks = [Task("a cat", 0), Task("a cat", 1), Task("a dog", 0)]
    assert len({store.clip_path(v, t) for v in ("a", "b") for t in tasks}) == 6


def test_other_settings_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.agree({"steps": 30})
    store.agree({"steps": 30})
    with pytest.raises(ValueError, match=r"steps is 30, got 20.*another --output"):
        store.agree({"steps": 20})
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        store.agree({"steps": 30})


def test_only_the_first_process_writes_settings(tmp_path: Path) -> None:
    Store(tmp_path, 1).agree({"steps": 30})
    assert not (tmp_path / "settings.json").exists()


@pytest.mark.parametrize(
    ("code", "sentence"),
    [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "Choose another --output")],
)
def test_what_the_disk_refuses_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, sentence: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(storing, "replace_file", refuse)
    monkeypatch.setattr(storing.os, "fsync", refuse)
    store = Store(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        store.write_array(tmp_path / "x.npy", np.zeros(1))
    with pytest.raises(ValueError, match=sentence):
        store.append({})
