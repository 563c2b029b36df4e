"""The causal form of PSA against its definition in float64 (test S11)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.attention import attend
from dit_sparse.causal import plan_of_causal_levels
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.importance import sampled_importance
from dit_sparse.method import CallContext
from dit_sparse.methods.psa import PsaMethod
from dit_sparse.plan import BlockPlan, Blocks
from dit_sparse.plan_check import check
from tests.selection_cases import LAYOUTS, frame, ranges

FACTORS = (2, 4, 8)
RUNS = [16, 16, 5, 16, 9]  # short blocks inside and at the end
CLIP = TokenLayout.of(TokenGrid(5, 9, 9))  # 7 blocks of 64, the last one of 21


def qkv(tokens: int, heads: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, tokens, 8)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))


def run(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Tensor:
    return attend(q, k, v, plan, backend="reference").out


def by_definition(level: Tensor, blocks: Blocks, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Token by token: a pooled row is read only where its whole group is in the past."""
    out = torch.zeros_like(q)
    for h in range(q.shape[1]):
        for i, queries in enumerate(ranges(blocks)):
            for t in queries:
                keys, values, bias = [], [], []
                for j, block in enumerate(ranges(blocks)):
                    factor = 1 if i == j else int(level[0, h, i, j])
                    for first in range(block.start, block.stop, factor) if factor else ():
                        last = min(first + factor, block.stop)
                        if last - 1 <= t:
                            keys.append(k[0, h, first:last].mean(0))
                            values.append(v[0, h, first:last].mean(0))
                            bias.append(math.log(last - first))
                scores = torch.stack(keys) @ q[0, h, t] * q.shape[-1] ** -0.5 + q.new_tensor(bias)
                out[0, h, t] = scores.softmax(0) @ torch.stack(values)
    return out


def test_every_level_is_its_definition():
    blocks = Blocks.of_runs(RUNS, 16)
    q, k, v = qkv(blocks.total)
    generator = torch.Generator().manual_seed(1)
    known = torch.tensor([0, 1, *FACTORS], dtype=torch.uint8)
    level = known[torch.randint(5, (1, 2, blocks.n, blocks.n), generator=generator)]
    plan = check(plan_of_causal_levels(level, blocks, factors=FACTORS))
    expected = by_definition(level, blocks, q, k, v)
    torch.testing.assert_close(run(q, k, v, plan), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("factor", [1, *FACTORS])
def test_a_later_token_changes_no_earlier_row(factor: int):
    blocks = Blocks.of_runs(RUNS, 16)
    q, k, v = qkv(blocks.total)
    level = torch.full((1, 1, blocks.n, blocks.n), factor, dtype=torch.uint8)
    plan = plan_of_causal_levels(level, blocks, factors=(factor,) if factor > 1 else ())
    before = run(q, k, v, plan)
    for token in (0, 1, 20, 36, blocks.total - 1):
        others = [x.clone() for x in (q, k, v)]
        for x in others:
            x[:, :, token] += 3
        after = run(*others, plan)
        assert torch.equal(after[:, :, :token], before[:, :, :token])
        assert not torch.equal(after[:, :, token], before[:, :, token])


OPTIONS: list[dict[str, Any]] = [
    {},
    {"allocation": "mass", "ends": (0.4, 0.5, 0.6, 0.8)},
    {"importance": "means"},
    {"norm": "max", "similarity": (0.1, 0.0, -0.1)},
    {"forced": ("neighbours", "first_frame")},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_later_block_changes_no_earlier_plan(options: dict[str, Any]):
    """A block's queries choose together, so that only its own rows may see its own tokens."""
    q, k, v = qkv(CLIP.length)
    given = {"ends": (0.2, 0.4, 0.6, 0.8), "block": 64, "order": "raster", "causal": True}
    method = PsaMethod(**{**given, **options})
    before = run(q, k, v, check(method.plan(q, k, CallContext(CLIP))))
    for block in range(1, 7):
        others = [x.clone() for x in (q, k, v)]
        for x in others:
            x[:, :, 64 * block :] *= -2
        after = run(*others, method.plan(*others[:2], CallContext(CLIP)))
        assert torch.equal(after[:, :, : 64 * block], before[:, :, : 64 * block])


def test_a_blocks_own_keys_take_no_place_of_others():
    q, k, _ = qkv(CLIP.length)
    method = PsaMethod(ends=(0, 0, 0, 3 / 7), block=64, order="raster", causal=True)
    plan = method.plan(q, k, CallContext(CLIP))
    assert plan.count[0, 0].tolist() == [1, 2, 3, 4, 4, 4, 4]


def test_all_exact_is_causal_attention():
    q, k, v = qkv(CLIP.length)
    method = PsaMethod(ends=(1.0, 1.0, 1.0, 1.0), block=64, order="raster", causal=True)
    plan = check(method.plan(q, k, CallContext(CLIP)))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(run(q, k, v, plan), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", ["softmax", "max"])
def test_samples_see_earlier_samples_alone(norm: Any):
    cut = frame("image", order="raster")
    q, k, _ = qkv(256)
    got = sampled_importance(q, k, cut, share=1, norm=norm, causal=True)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.ones(256, 256).triu(1).bool(), -math.inf)
    best = scores.unflatten(-1, (-1, 64)).amax(-1)
    base = best.amax(-1) if norm == "max" else scores.logsumexp(-1)
    weight = (best - base[..., None]).exp().unflatten(2, (-1, 64)).amax(3)
    expected = (weight / weight.sum(-1, keepdim=True)).float()
    torch.testing.assert_close(got.float(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "order='raster' and skipped='drop' .* got order='hilbert'"),
        ({"order": "raster", "skipped": "mean"}, "skipped='drop' .* got .* skipped='mean'"),
    ],
)
def test_refuses_options(options: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        PsaMethod(causal=True, **options)


def test_refuses_text():
    layout = LAYOUTS["text"]
    q, k, _ = qkv(layout.length)
    method = PsaMethod(ends=(1.0, 1.0, 1.0, 1.0), causal=True, order="raster")
    with pytest.raises(ValueError, match="a picture alone for causal=True"):
        method.plan(q, k, CallContext(layout))


def test_plans_are_made_without_values():
    q = torch.empty(2, 4, CLIP.length, 16, device="meta")
    plan = PsaMethod(causal=True, order="raster").plan(q, q, CallContext(CLIP))
    assert plan.device.type == "meta"
