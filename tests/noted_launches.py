"""Which kernels a call launches."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from dit_sparse.plan import BlockPlan

#: The kernel or the part of it, and its plan.
Run = tuple[str, BlockPlan]


def noted(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """What is launched from now on: the kernel or the part of it, and its plan."""
    modules = {
        name: pytest.importorskip(f"dit_sparse.kernels.{module}")
        for name, module in (("hopper", "hopper"), ("gluon", "hopper_gluon"), ("all", "portable"))
    }
    runs: list[Run] = []

    def note(real: Any, name: str, *given: Any, part: str | None = None, **options: Any) -> Any:
        plan = next(x for x in given if isinstance(x, BlockPlan))
        parts = {} if part is None else {"part": part}
        done = real(*given, **parts, **options)
        if done is not None:
            runs.append((name if part is None else part, plan))
        return done

    for name, module in modules.items():
        monkeypatch.setattr(module, "launch", partial(note, module.launch, name))
    return runs
