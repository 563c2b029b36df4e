"""Dynamic choice with a calibrated prior, in the order of each head."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dit_sparse import methods, selection
from dit_sparse.attention import attend
from dit_sparse.grid import TokenLayout
from dit_sparse.method import SparseMethod
from dit_sparse.methods.guided import GuidedMethod
from dit_sparse.model_identity import ModelIdentity
from dit_sparse.plan_check import check
from tests.oracle import planned_attention
from tests.paro_cases import GRID, calibration, context, random_masks

HEADS = (0.4, 0.4)
NAMES = ("HWF", "WFH")
TEXT = TokenLayout.of(GRID, 10, 23)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    found = calibration({0: random_masks(1, HEADS, 7)}, [NAMES])
    return str(found.save_pretrained(tmp_path))


def qkv(layout: TokenLayout, batch: int = 2) -> list[Tensor]:
    source = torch.Generator().manual_seed(0)
    shape = (batch, 2, layout.length, 8)
    return [torch.randn(shape, generator=source, dtype=torch.float64) for _ in range(3)]


def test_without_a_bonus_q_and_k_decide(folder: str):
    guided = GuidedMethod(folder, density=0.3, bonus=0.0)
    q, k, _ = qkv(TEXT)
    ctx = context(guided.paro.calibration, TEXT)
    frame = guided.paro.frame(q, ctx)
    assert frame.order is not None
    assert frame.order.index.ndim == 2
    means = [selection.block_means(x, frame) for x in (q, k)]
    scores = means[0] @ means[1].mT
    scores[..., frame.context] = -torch.inf
    expected = selection.top_k(scores, 2)  # 0.3 of 7 blocks
    got = guided.plan(q, k, ctx).listed("full")
    picture = ~frame.context
    assert torch.equal(got[:, :, picture][..., picture], expected[:, :, picture][..., picture])


def test_a_large_bonus_takes_the_mask_first(folder: str):
    guided = GuidedMethod(folder, density=0.5, bonus=1e4)
    q, k, _ = qkv(TokenLayout.of(GRID))
    found = guided.paro.calibration
    read = guided.plan(q, k, context(found)).listed("full")
    mask = found.mask(0, 0)
    few = mask.sum(-1) <= 3  # 0.5 of 7 blocks
    assert few.any()
    assert (read | ~mask)[:, few].all()
    assert (mask | ~read)[:, mask.sum(-1) >= 3].all()
    assert (read.sum(-1) == 3).all()


def test_a_small_bonus_lies_between(folder: str):
    q, k, _ = qkv(TokenLayout.of(GRID))
    found = GuidedMethod(folder).paro.calibration
    shares = []
    for bonus in (0.0, 0.2, 100.0):
        read = GuidedMethod(folder, density=0.3, bonus=bonus).plan(q, k, context(found))
        listed = read.listed("full")
        shares.append(float((listed & found.mask(0, 0)).sum() / listed.sum()))
    assert shares[0] < shares[1] < shares[2]


@pytest.mark.parametrize("tail", ["none", "zeroth"])
@pytest.mark.parametrize("layout", [TokenLayout.of(GRID), TEXT], ids=str)
def test_its_plans_are_whole_and_mean_what_they_say(folder: str, layout: TokenLayout, tail: str):
    guided = GuidedMethod(folder, density=0.3, tail=tail)
    assert isinstance(guided, SparseMethod)
    q, k, v = qkv(layout)
    plan = check(guided.plan(q, k, context(guided.paro.calibration, layout)))
    out, lse = attend(q, k, v, plan)
    expected, mass = planned_attention(q, k, v, plan)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse.double(), mass, rtol=1e-5, atol=1e-5)


def test_it_is_known_by_name_and_can_be_copied(folder: str):
    guided = methods.create("guided", {"path": folder, "bonus": 1.0})
    assert copy.deepcopy(guided) == guided
    with pytest.raises(ValueError, match="Calibrate this model"):
        guided.check_model(ModelIdentity("Other", "1"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"density": 0.0}, "Expected a density above 0"),
        ({"bonus": -1.0}, "Expected a finite bonus"),
        ({"reuse_steps": 0}, "Expected reuse_steps"),
        ({"tail": "first"}, "Expected tail among none, zeroth"),
        ({"path": "nowhere"}, "Expected a calibration in 'nowhere'"),
    ],
)
def test_bad_input(change: dict, sentence: str, folder: str):
    with pytest.raises(ValueError, match=sentence):
        GuidedMethod(**({"path": folder} | change))
