"""The meaning of quantised attention, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.attention import attend
from dit_sparse.kernels.emulated import EmulatedBackend, round_blocks, round_channels
from dit_sparse.plan import BlockPlan, Blocks
from tests.block_cases import Case, plan_of, tensors_of
from tests.oracle import masked_attention

LEAST = {"fp8": 0.997, "int8": 0.999}


def like_a_layer(tokens: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys with outlying channels and a mean key, values with a mean."""
    generator = torch.Generator().manual_seed(tokens + dim)
    q, k, v = (torch.randn(1, 2, tokens, dim, generator=generator) for _ in range(3))
    k[..., :4] *= 3
    q[..., 4:8] *= 3
    k[..., 5] += 12
    k[..., 17] -= 9
    v[..., 3] = v[..., 3] * 6 + 4
    return q, k, v


def dense(tokens: int, size: int = 64) -> BlockPlan:
    blocks = Blocks.uniform(tokens, size)
    return BlockPlan.from_mask(torch.ones(1, 1, blocks.n, blocks.n).bool(), blocks, blocks)


def cosine(got: Tensor, expected: Tensor) -> float:
    return float(F.cosine_similarity(got.double().flatten(), expected.double().flatten(), dim=0))


@pytest.mark.parametrize("precision", LEAST)
@pytest.mark.parametrize("dim", [64, 128])
def test_near_exact_attention(precision: str, dim: int):
    q, k, v = like_a_layer(400, dim)
    out, lse = attend(q, k, v, dense(400), backend=EmulatedBackend(precision))
    expected, mass = masked_attention(q, k, v)
    assert cosine(out, expected) >= LEAST[precision]
    assert (lse - mass).abs().mean() < (0.1 if precision == "fp8" else 0.02)


@pytest.mark.parametrize("precision", ["fp8", "int8", "int4"])
def test_the_mean_key_is_what_quantisation_suffers_from(precision: str):
    q, k, v = like_a_layer(400, 64)
    expected, _ = masked_attention(q, k, v)
    error = [
        float((attend(q, k, v, dense(400), backend=backend).out - expected).norm())
        for backend in (EmulatedBackend(precision), EmulatedBackend(precision, smooth=False))
    ]
    assert error[0] < 0.8 * error[1]


def test_four_bits_are_coarser_than_eight():
    q, k, v = like_a_layer(300, 64)
    expected, _ = masked_attention(q, k, v)
    got = {
        name: cosine(attend(q, k, v, dense(300), backend=EmulatedBackend(name)).out, expected)
        for name in ("int8", "int4")
    }
    assert got["int4"] < got["int8"]
    assert got["int4"] > 0.8


@pytest.mark.parametrize("precision", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("order", ["none", "head"])
@pytest.mark.parametrize("box", [True, False])
def test_plans(precision: str, order: str, box: bool):
    """Lists, boxes, orders and empty rows are those of the plan."""
    case = Case(64, 32, 32, box=box, order=order)
    plan = plan_of(case)
    q, k, v = tensors_of(case, plan)
    out, lse = attend(q, k, v, plan, backend=EmulatedBackend(precision))
    expected, mass = masked_attention(q, k, v, plan.to_mask())
    empty = mass == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert empty.any()
    assert not out[empty].any()
    assert cosine(out, expected) > (0.97 if precision == "int4" else 0.998)


@pytest.mark.parametrize("precision", ["fp8", "int8", "int4"])
def test_what_is_no_number_is_seen(precision: str):
    """As in the kernels; rows without a key are 0 beside it."""
    q, k, v = like_a_layer(128, 64)
    q[:, :, 3] = float("nan")  # a block has one step: all of its rows are lost
    plan = dense(128)
    alone = replace(plan, full=plan.full * torch.tensor([1, 0]))
    for one, last in ((plan, None), (alone, 0.0)):
        out, lse = attend(q, k, v, one, backend=EmulatedBackend(precision))
        assert out[:, :, :64].isnan().all()
        assert lse[:, :, :64].isnan().all()
        assert not out[:, :, 64:].isnan().any()
        if last is not None:
            assert not out[:, :, 64:].any()
            assert (lse[:, :, 64:] == -torch.inf).all()


def test_equal_values_come_out_as_they_are():
    """The weights' rounding does not alter what all values have in common."""
    q, k, v = like_a_layer(200, 64)
    v[:] = v[:, :, :1]
    out = attend(q, k, v, dense(200), backend=EmulatedBackend("fp8")).out
    torch.testing.assert_close(out, v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("precision", "largest"), [("int8", 127), ("int4", 7)])
def test_integers_are_within_half_a_step(precision: str, largest: int):
    x = torch.randn(1, 2, 100, 16)
    blocks = Blocks.of_runs([70, 30], 32)
    error = (round_blocks(x, blocks, precision) - x).abs()
    for rows in (slice(a, b) for a, b in zip(blocks.starts, blocks.starts[1:], strict=False)):
        step = x[:, :, rows].abs().amax((2, 3), keepdim=True) / largest
        assert (error[:, :, rows] <= step * 0.5001).all()


def test_e4m3_has_three_bits_of_fraction():
    v = torch.randn(1, 2, 500, 8) * torch.tensor([1.0, 1e3, 1e-3, 1, 1, 1, 1, 1])
    assert ((round_channels(v) - v).abs() <= v.abs() / 16 + v.abs().amax(2, True) / 448 / 512).all()


def test_refusals():
    with pytest.raises(ValueError, match="Expected a precision among fp8, int8, int4, got 'fp4'"):
        EmulatedBackend("fp4")


@pytest.mark.parametrize("tail", ["zeroth", "first"])
def test_tails_are_added_without_rounding(tail: str):
    q, k, v = like_a_layer(256, 64)
    blocks = Blocks.uniform(256, 32)
    mask = torch.eye(8).bool()[None, None]
    plan = BlockPlan.from_mask(mask, blocks, blocks, tail=tail)
    got = attend(q, k, v, plan, backend=EmulatedBackend("int8"))
    exact = attend(q, k, v, plan)
    assert cosine(got.out, exact.out) > 0.9995
    assert (got.lse - exact.lse).abs().mean() < 0.02
    alone = attend(q, k, v, BlockPlan.from_mask(mask, blocks, blocks))
    assert cosine(alone.out, exact.out) < 0.99


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_hidden_keys_have_no_part_in_means_and_steps(precision: str):
    q, k, v = like_a_layer(256, 64)
    hidden = torch.tensor([[False] * 6 + [True] * 2])
    mask = ~hidden[:, None, None].expand(1, 1, 8, 8)
    blocks = Blocks.uniform(256, 32)
    plan = replace(BlockPlan.from_mask(mask, blocks, blocks), hidden=hidden)
    expected = attend(q, k, v, plan, backend=EmulatedBackend(precision))
    k[:, :, 192:], v[:, :, 192:] = 1e4, torch.nan
    got = attend(q, k, v, plan, backend=EmulatedBackend(precision))
    assert torch.equal(got.out, expected.out)
    assert torch.equal(got.lse, expected.lse)
