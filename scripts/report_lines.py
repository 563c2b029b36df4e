"""JSON lines of benchmarks and evaluations, for `report.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def environment_of(rows: list[dict[str, Any]]) -> str:
    environment = rows[0]["environment"]
    names = [f"{n} {environment.get(n)}" for n in ("torch", "triton", "diffusers", "cudnn")]
    return f"One {environment['device']}, {', '.join(n for n in names if 'None' not in n)}, bf16"
