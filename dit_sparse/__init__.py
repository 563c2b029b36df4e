"""Faster diffusion transformers through block-sparse attention.

    import dit_sparse
    dit_sparse.apply(pipe, "window", options={"density": 0.3})

Importing this package loads neither diffusers nor triton; the names below are imported when they
are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dit_sparse import methods, models
    from dit_sparse.attention import attend, dense_attention, plan_and_attend
    from dit_sparse.backend import AttentionOutput, Backend
    from dit_sparse.calibration import Calibration
    from dit_sparse.grid import Permutation, TextSpan, TokenGrid, TokenLayout
    from dit_sparse.method import CallContext, SparseMethod
    from dit_sparse.pipelines.apply import apply, remove, summary
    from dit_sparse.pipelines.calibrate import calibrate
    from dit_sparse.pipelines.load import load
    from dit_sparse.pipelines.mapping import SparseAttnProcessor
    from dit_sparse.plan import BlockPlan
    from dit_sparse.plan_io import load_plan, save_plan

_HOMES = {
    "AttentionOutput": "dit_sparse.backend",
    "Backend": "dit_sparse.backend",
    "BlockPlan": "dit_sparse.plan",
    "Calibration": "dit_sparse.calibration",
    "CallContext": "dit_sparse.method",
    "Permutation": "dit_sparse.grid",
    "SparseAttnProcessor": "dit_sparse.pipelines.mapping",
    "SparseMethod": "dit_sparse.method",
    "TextSpan": "dit_sparse.grid",
    "TokenGrid": "dit_sparse.grid",
    "TokenLayout": "dit_sparse.grid",
    "apply": "dit_sparse.pipelines.apply",
    "attend": "dit_sparse.attention",
    "calibrate": "dit_sparse.pipelines.calibrate",
    "dense_attention": "dit_sparse.attention",
    "load": "dit_sparse.pipelines.load",
    "load_plan": "dit_sparse.plan_io",
    "plan_and_attend": "dit_sparse.attention",
    "remove": "dit_sparse.pipelines.apply",
    "save_plan": "dit_sparse.plan_io",
    "summary": "dit_sparse.pipelines.apply",
}

__all__ = [
    "AttentionOutput",
    "Backend",
    "BlockPlan",
    "Calibration",
    "CallContext",
    "Permutation",
    "SparseAttnProcessor",
    "SparseMethod",
    "TextSpan",
    "TokenGrid",
    "TokenLayout",
    "__version__",
    "apply",
    "attend",
    "calibrate",
    "dense_attention",
    "load",
    "load_plan",
    "methods",
    "models",
    "plan_and_attend",
    "remove",
    "save_plan",
    "summary",
]


def __getattr__(name: str) -> Any:
    if name in ("methods", "models"):
        return importlib.import_module(f"dit_sparse.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
