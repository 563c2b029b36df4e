"""README's figures are those of the recorded measurements."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dit_sparse.evaluation.variants import BASELINES
from scripts.report import DENSE, with_tables
from scripts.report_steps import steps_summary, steps_table

ROOT = Path(__file__).resolve().parents[1]


def test_readme_says_what_was_measured() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "report.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def step(variant: str, **more: Any) -> dict[str, Any]:
    return {
        "model": "wan",
        "compiled": True,
        "variant": variant,
        "environment": {"device": "a GPU"},
        **more,
    }


def timed(variant: str, ms: float, **more: Any) -> dict[str, Any]:
    known = {"tokens": 1000, "attention_share": 0.5, "measured_density": 0.2, "ideal": 2.0}
    return step(variant, ms=ms, **known, **more)


def test_steps_say_what_is_estimated_and_what_failed() -> None:
    rows = [
        timed("stock", 30.0, estimated=True, speedup=1.0),
        timed("dense", 20.0, estimated=True, speedup=1.5),
        timed("window 0.2", 10.0, estimated=True, speedup=1.8),
        step("pisa 0.2", failed="RuntimeError: no memory"),
    ]
    table = steps_table(rows)
    assert "| ~30 ms | ~20 ms | 50% | window | 0.200 | ~10 ms | 1.80x | 2.00x | 0.90 |" in table
    assert "* wan, compiled, pisa 0.2 failed: RuntimeError: no memory" in table
    assert "| pisa |" not in table
    rows[0] = step("stock", failed="no")
    assert "| failed | ~20 ms |" in steps_table(rows)


def test_the_summary_has_a_line_for_each_model_and_a_column_for_each_method() -> None:
    rows = [
        timed("stock", 30.0, estimated=True, speedup=0.7),
        timed("dense", 20.0, estimated=True, speedup=1.0),
        timed("window 0.2", 10.0, estimated=True, speedup=1.8),
        step("pisa 0.2", failed="RuntimeError: no memory"),
        {**timed("stock", 9.0, speedup=1.0), "model": "flux", "compiled": False},
        {**timed("pisa 0.2", 4.5, speedup=2.0), "model": "flux", "compiled": False},
    ]
    table = steps_summary(rows)
    assert (
        "| mode | dense | attention | window 0.2 | pisa 0.2 |\n|---|---|---|---|---|---|" in table
    )
    assert "| wan, 1,000 | compiled | ~20 ms | 50% | 1.80x (2.00) | failed |" in table
    assert "| flux, 1,000 | eager | 9 ms | 50% |  | 2.00x (2.00) |" in table
    assert "* wan, compiled, pisa 0.2 failed: RuntimeError: no memory" in table


def test_a_model_without_a_dense_step_has_no_line_in_the_summary() -> None:
    failed = [step(name, failed="no memory") for name in ("stock", "dense", "pisa 0.2")]
    table = steps_summary([{**row, "model": "hunyuan"} for row in failed] + [timed("dense", 20.0)])
    assert "| hunyuan" not in table
    assert "* hunyuan, compiled, stock failed: no memory" in table
    assert "| wan, 1,000 | compiled | 20 ms |" in table


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    return tmp_path


def test_quality_tables_are_those_of_the_reports_that_were_kept(root: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    begin, end = "<!-- quality: from docs/quality/*/summary.jsonl -->", "<!-- quality: end -->"
    assert f"{begin}\n{end}" in with_tables(readme, root), "nothing was kept"
    folder = root / "docs" / "quality" / "tiny video"
    folder.mkdir(parents=True)
    common = {
        "model": "tiny-video",
        "arguments": {"height": 128},
        "prompts": ["a cat"],
        "seeds": [0],
        "dtype": "bfloat16",
        "compiled": False,
        "environment": {"device": "a GPU"},
        "recommendation": "Turn on window density=0.2.",
    }
    row = {
        "label": "window density=0.2",
        "clips": 4,
        "density": 0.2,
        "speedup": 2.0,
        "speedup_total": 1.5,
        "model_of_speed": None,
        "quality": {"psnr": 31.0},
        "worst": {"psnr": 28.0},
        "identical": 0,
        "failed": None,
    }
    slower = {**row, "label": "window density=0.3", "speedup": 1.9, "quality": {"psnr": 30.0}}
    better = {**slower, "label": "window density=0.4", "quality": {"psnr": 32.0}}
    same = {**slower, "label": "window density=1", "speedup": 0.9, "quality": {"psnr": None}}
    broken = {**better, "label": "psa", "speedup": 3.0, "failed": "no memory"}
    dense = {**better, "label": "flash"}
    unmeasured = {**slower, "label": "pisa", "speedup": None}
    found = [dense, same | {"identical": 4}, slower, row, better, broken, unmeasured]
    lines = [json.dumps({**each, **common}) for each in found]
    (folder / "summary.jsonl").write_text("\n".join(lines) + "\n")
    found = with_tables(readme, root)
    assert "### Quality: tiny video\n\nTurn on window density=0.2. [The report](docs" in found
    assert "| window density=0.2 | 0.200 | 2.00x |  | 1.50x | 31.0 (28.0) |  |" in found
    assert "| window density=1 | 0.200 | 0.90x |  | 1.50x | identical |  |" in found
    assert "Of 6 methods" in found
    shown = re.findall(r"^\| ([^|]+) \| 0.200 \|", found.partition("tiny video")[2], re.MULTILINE)
    assert shown == ["window density=0.2", "window density=0.4", "window density=1"]
    assert with_tables(found, root) == found
    assert DENSE == BASELINES
    slow = [{**each, **common, "speedup": 0.9} for each in (dense, row, better)]
    (folder / "summary.jsonl").write_text("".join(json.dumps(each) + "\n" for each in slow))
    short = with_tables(readme, root)
    assert "### Quality: tiny video\n\nTurn on window density=0.2. [The report](docs" in short
    assert "0.90x" not in short.partition(begin)[2]


def test_a_readme_without_markers_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="steps: from benchmarks"):
        with_tables("nothing", root)
