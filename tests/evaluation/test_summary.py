"""What is recommended, and which times it rests on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dit_sparse.evaluation.store import Line, Store
from dit_sparse.evaluation.summary import Summary, summarise

SPARSE = "window density=0.2"


def line(variant: str, denoise: float, **changed: Any) -> Line:
    """A finished clip, warm and of the first process if nothing else is said."""
    seconds = {"encode": 0.1, "denoise": denoise, "decode": 0.1, "total": denoise + 0.2}
    metrics = {} if variant == "stock" else {"psnr": 40.0, "identical": False}
    return {
        "kind": "clip",
        "variant": variant,
        "prompt": "a cat",
        "seed": 0,
        "status": "ok",
        "warm": True,
        "process": 0,
        "command": ["dit-sparse", "sample"],
        "seconds": seconds,
        "steps": 2,
        "peak_bytes": None,
        "density": 0.2,
        "record": None,
        "metrics": metrics,
        **changed,
    }


def summary(folder: Path, *lines: Line) -> Summary:
    store = Store(folder)
    for each in lines:
        store.append(each)
    return summarise(store, 30.0)


def test_the_fastest_good_variant_is_recommended(tmp_path: Path) -> None:
    found = summary(tmp_path, line("stock", 3.0), line("dense", 2.0), line(SPARSE, 1.0))
    assert found.baseline == "dense"
    assert f"Turn on {SPARSE}: 2.00x" in found.recommendation


def test_what_failed_for_a_prompt_is_not_recommended(tmp_path: Path) -> None:
    failed = {"status": "failed", "error": "RuntimeError: no memory", "prompt": "a dog"}
    found = summary(tmp_path, line("stock", 2.0), line(SPARSE, 1.0), line(SPARSE, 1.0, **failed))
    assert found.best is None
    assert found.rows[1].speedup == 2.0


def test_first_runs_of_dense_variants_do_not_flatter_warm_ones(tmp_path: Path) -> None:
    cold = line("stock", 9.0, warm=False)
    assert summary(tmp_path / "a", cold, line(SPARSE, 1.0)).best is None
    warm = summary(tmp_path / "b", cold, line("dense", 20.0), line(SPARSE, 1.0))
    assert warm.baseline == "dense"
    assert warm.rows[0].speedup is None


def test_times_are_those_of_the_first_process(tmp_path: Path) -> None:
    other = line(SPARSE, 100.0, process=1, prompt="a dog")
    found = summary(tmp_path, line("stock", 2.0), line(SPARSE, 1.0), other).rows[1]
    assert (found.clips, found.times, found.speedup) == (2, 1, 2.0)


def test_a_failure_of_a_further_run_is_named(tmp_path: Path) -> None:
    repeat = line(SPARSE, 1.0, kind="repeat", status="failed", error="RuntimeError: no memory")
    found = summary(tmp_path, line("stock", 2.0), line(SPARSE, 1.0), repeat)
    assert found.gaps == {f"a further time of {SPARSE}": "RuntimeError: no memory"}
