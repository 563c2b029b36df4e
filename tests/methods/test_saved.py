"""A saved plan run as a method."""

import pytest
import torch

from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.method import CallContext, SparseMethod
from dit_sparse.methods.saved import SavedPlan
from dit_sparse.methods.window import WindowMethod

GRID = TokenGrid(3, 4, 6)
CONTEXT = CallContext(TokenLayout.of(GRID))


def qk(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(1, 2, tokens, 8), torch.zeros(1, 2, tokens, 8)


def test_it_answers_with_the_plan():
    plan = WindowMethod(density=0.5).plan(*qk(GRID.length), CONTEXT)
    method = SavedPlan(plan)
    assert isinstance(method, SparseMethod)
    assert method.dense_reason(CONTEXT) is None
    got = method.plan(*qk(GRID.length), CONTEXT)
    assert torch.equal(got.to_mask(), plan.to_mask())


def test_it_refuses_another_grid():
    method = SavedPlan(WindowMethod(density=0.5).plan(*qk(GRID.length), CONTEXT))
    with pytest.raises(ValueError, match="got 60 and 60: the plan is for another grid"):
        method.plan(*qk(60), CallContext(TokenLayout.of(TokenGrid(3, 4, 5))))
