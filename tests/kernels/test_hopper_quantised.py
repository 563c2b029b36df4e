"""The 8-bit Hopper kernel in the interpreter: its arithmetic, not its instructions."""

from __future__ import annotations

import re
import struct
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dit_sparse.backend import AttentionOutput
from dit_sparse.plan import BlockPlan, Blocks
from tests.block_cases import Case, plan_of, tensors_of
from tests.oracle import masked_attention

triton = pytest.importorskip("triton")
tl = triton.language
_hopper_quantised = pytest.importorskip("dit_sparse.kernels._hopper_quantised")
_weight_bits = pytest.importorskip("dit_sparse.kernels._weight_bits")
hopper_quantised = pytest.importorskip("dit_sparse.kernels.hopper_quantised")
quantise = pytest.importorskip("dit_sparse.kernels.quantise").quantise

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")


@triton.jit
def _packed(p):
    return p.to(tl.float8e4nv).to(tl.int8, bitcast=True).to(tl.int32)


@triton.jit
def _unpacked(bits):
    return bits.to(tl.int8)


@triton.jit
def _nothing(like):
    return tl.zeros(like.shape, tl.float32)


@triton.jit
def _greatest(scores):
    return tl.max(scores.to(tl.float32), 1)


@triton.jit
def _weights(scores, factor, origin):
    """Two to a number on a GPU, here one."""
    n = scores.to(tl.float32) * factor.to(tl.float16) + origin[:, None]
    n = tl.maximum(n.to(tl.float16), 1024.0).to(tl.int16, bitcast=True) - 0x6400
    power = ((n >> 5) << 10).to(tl.float16, bitcast=True).to(tl.float32)
    part = 1.0 + (n & 31).to(tl.float32) / 32
    return (power * part).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def _packed_pairs(pairs):
    return _packed(pairs.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32))


@triton.jit
def _mass_of_pairs(pairs, length, SHORT: tl.constexpr):
    p = pairs.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    inside = tl.arange(0, pairs.shape[1])[None, :] < length
    return tl.sum(tl.where(inside, p, 0.0), 1)


ASSEMBLY = (
    *(_packed, _unpacked, _nothing),
    *(_greatest, _weights, _packed_pairs, _mass_of_pairs),
)


@pytest.fixture(autouse=True)
def without_assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter knows no assembly: what it is meant to do takes its place."""
    for function in ASSEMBLY:
        monkeypatch.setattr(_hopper_quantised, function.fn.__name__, function)


def run(plan: BlockPlan, case: Case, *, integers: bool, values: bool, **options: bool) -> None:
    """Compares with float64: the LSE, that empty rows are 0, and the direction of the rest.

    Bounds in e4m3 are wide: the interpreter's conversion to it drops carries.
    """
    q, k, v = tensors_of(case, plan)
    k[..., 3] += 5
    v[..., 2] += 3
    quantised = quantise(q, k, v, plan, integers=integers, values=values)
    ordered = v.contiguous() if plan.order is None else plan.order(v)
    got = AttentionOutput(torch.full_like(q, torch.nan), torch.full(q.shape[:3], torch.nan))
    parts = (False, True) if plan.box is not None else (False,)
    for partial in parts:
        launched = hopper_quantised.launch(
            quantised, ordered, plan, case.head_dim**-0.5, got, partial=partial, **options
        )
        assert launched is not None
    out, lse = masked_attention(q, k, v, plan.to_mask())
    empty = lse == -torch.inf
    assert torch.equal(got.lse == -torch.inf, empty)
    assert not got.out[empty].any()
    tolerance = 0.05 if integers else 0.3
    torch.testing.assert_close(got.lse.double(), lse, rtol=0, atol=tolerance)
    similar = F.cosine_similarity(got.out.double().flatten(), out.flatten(), dim=0)
    assert similar > (0.9995 if integers and not values else 0.997)


@pytest.mark.parametrize(
    ("integers", "values", "box", "order"),
    [
        (True, True, True, "head"),
        (True, False, True, "none"),
        (False, True, False, "none"),
        (False, False, False, "head"),
    ],
)
def test_plans(integers: bool, values: bool, box: bool, order: str):
    case = Case(32, 32, 32, torch.float16, box=box, order=order)
    run(plan_of(case), case, integers=integers, values=values)


@pytest.mark.parametrize("tokens", [120, 128])
def test_a_short_last_block(tokens: int):
    case = Case(32, 32, 32, torch.float16, box=False)
    blocks = Blocks.uniform(tokens, 32)
    mask = torch.rand(2, 2, blocks.n, blocks.n, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[0, 0, 0] = False
    plan = BlockPlan.from_mask(mask, blocks, blocks)
    run(plan, case, integers=True, values=True)


@pytest.mark.parametrize(
    ("integers", "order", "heads"), [(True, "head", "batch"), (False, "none", "shared")]
)
def test_the_longest_lists_first_change_nothing(integers: bool, order: str, heads: str):
    """Neither of full entries nor of masked ones."""
    case = Case(32, 32, 32, torch.float16, order=order, lists=heads)
    plan = plan_of(case)
    q, k, v = tensors_of(case, plan)
    quantised = quantise(q, k, v, plan, integers=integers)
    results = []
    for uneven in (False, True):
        given = replace(plan, uneven=uneven)
        got = AttentionOutput(torch.full_like(q, torch.nan), torch.full(q.shape[:3], torch.nan))
        queues = []
        for partial in (False, True):
            assert hopper_quantised.launch(quantised, v, given, 0.2, got, partial=partial)
            queues = list(vars(given).get("_longest_first", {}).values())
            assert len(queues) == uneven * (1 + partial)
        for queue in queues:  # an order that would be no other tests nothing
            assert not torch.equal(queue, torch.arange(len(queue)))
        results.append(got)
    plain, longest = results
    assert not plain.out.isnan().any()
    assert torch.equal(plain.out, longest.out)
    assert torch.equal(plain.lse, longest.lse)


def test_values_that_were_beyond_the_sample():
    """What all values of a head were divided by once more, the result is multiplied by."""
    case = Case(32, 32, 32, torch.float16, box=False)
    plan = plan_of(case)
    q, k, v = tensors_of(case, plan)
    quantised = quantise(q, k, v, plan)
    outs = []
    for excess in (0.0, 448.0, 896.0):
        quantised.excess.fill_(excess)
        got = AttentionOutput(torch.empty_like(q), torch.empty(q.shape[:3]))
        assert hopper_quantised.launch(quantised, v, plan, 0.2, got) is not None
        outs.append(got.out.float())
    centre = quantised.centres[:, :, None, 1] * got.lse.isfinite()[..., None]
    torch.testing.assert_close(outs[1], outs[0])
    torch.testing.assert_close(outs[2] - centre, 2 * (outs[0] - centre), rtol=1e-2, atol=1e-2)
    assert (outs[2] - outs[0]).abs().max() > 0.1


def test_sums_of_weights_fit_into_integers():
    """For any greatest score, in ticks, when all keys of a block have it."""
    unit = re.search(r"mul\.f32 f, f, 0f(\w+);", _weight_bits._SUMS.value)
    assert unit is not None
    (units,) = struct.unpack(">f", bytes.fromhex(unit[1]))
    greatest = torch.arange(-57_600.0, 57_601.0)  # of rows no longer than 240
    origin = (1024 + 15 * 32 - (greatest - 8.75 * 32)).half().float()
    tick = (greatest + origin).half().float() - 1024
    weight = (tick // 32 - 15).exp2() * (1 + tick % 32 / 32)
    assert (128 * weight * units).max() < 2**31
