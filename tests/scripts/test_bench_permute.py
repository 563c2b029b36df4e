"""The benchmark of the permutation, small and on a CPU."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.grid import TokenGrid

module = pytest.importorskip("scripts.bench_permute")


@pytest.mark.parametrize("kind", module.KINDS)
def test_rows(kind: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = module.measure(TokenGrid(2, 8, 8), 5, 2, 16, kind, device, rounds=2)
    assert [row["variant"] for row in rows] == ["copy", "permute", "undo"]
    assert rows[0]["of_copy"] == 1.0
    assert all(row["tokens"] == 133 and row["ms"] > 0 for row in rows)


def test_a_wrong_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "permute", lambda tensors, order: list(tensors))
    with pytest.raises(RuntimeError, match="Expected the order of indexing"):
        module.measure(TokenGrid(2, 8, 8), 0, 1, 16, module.KINDS[0], "cpu", rounds=2)
