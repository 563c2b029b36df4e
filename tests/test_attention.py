"""Choice of a backend, orders around it, and dense attention with padded text."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from dit_sparse.attention import attend, backends, dense_attention, select_backend
from dit_sparse.backend import AttentionOutput, Backend
from dit_sparse.grid import Permutation, TextSpan, TokenGrid, TokenLayout
from dit_sparse.plan import BlockPlan, Blocks
from tests.oracle import masked_attention

TOKENS, HEADS = 24, 2


def plan_of(tokens: int = TOKENS, lead: tuple[int, int] = (1, 1)) -> BlockPlan:
    blocks = Blocks.uniform(tokens, 16)
    generator = torch.Generator().manual_seed(0)
    visited = torch.rand(*lead, blocks.n, blocks.n, generator=generator) < 0.7
    return BlockPlan.from_mask(visited, blocks, blocks)


def tensors(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(shape or (2, HEADS, TOKENS, 16), generator=generator) for _ in range(3))
    return q.to(dtype), k.to(dtype), v.to(dtype)


@dataclass(frozen=True)
class Probe:
    """A backend that keeps what it was given and answers with the queries."""

    reorders: bool = False
    refusal: str | None = None
    seen: list[tuple[Tensor, Tensor, Tensor, float]] = field(default_factory=list)

    name: str = "probe"

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> str | None:
        return self.refusal

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
    ) -> AttentionOutput:
        self.seen.append((q, k, v, scale))
        return AttentionOutput(q, q[..., 0])


class TestBackends:
    def test_order_of_preference(self):
        pytest.importorskip("triton")
        assert [b.name for b in backends()] == ["triton", "flex", "reference"]

    def test_each_keeps_the_protocol(self):
        assert all(isinstance(backend, Backend) for backend in backends())

    def test_the_first_that_does_not_refuse(self):
        pytest.importorskip("triton")
        backend, refusals = select_backend(*tensors(), plan_of())
        assert backend.name == "reference"
        assert [r.partition(":")[0] for r in refusals] == ["triton", "flex"]
        assert all(r.endswith("expected tensors on a GPU, got cpu.") for r in refusals)

    def test_by_name(self):
        backend, refusals = select_backend(*tensors(), plan_of(), "reference")
        assert (backend.name, refusals) == ("reference", ())

    def test_a_named_one_that_refuses(self):
        with pytest.raises(ValueError, match=r"^No attention backend runs this call\. flex: expec"):
            select_backend(*tensors(), plan_of(), "flex")

    def test_an_unknown_name_gets_the_nearest(self):
        with pytest.raises(ValueError, match=r"got 'refrence'\. Did you mean 'reference'\?"):
            select_backend(*tensors(), plan_of(), "refrence")
        with pytest.raises(ValueError, match=r"reference, got 'xyz'\.$"):
            attend(*tensors(), plan_of(), backend="xyz")


class TestAttend:
    @pytest.mark.parametrize("backend", [None, "reference"])
    @pytest.mark.parametrize("scale", [None, 0.4])
    def test_values_and_lse(self, backend: str | None, scale: float | None):
        q, k, v = tensors()
        plan = replace(plan_of(), order=Permutation(torch.arange(TOKENS).flip(0)))
        got = attend(q, k, v, plan, scale=scale, backend=backend)
        out, lse = masked_attention(q, k, v, plan.to_mask(), scale)
        torch.testing.assert_close(got.out.double(), out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.lse.double(), lse, rtol=1e-5, atol=1e-5)

    def test_the_order_is_applied_and_undone(self):
        probe, (q, k, v) = Probe(), tensors()
        index = torch.stack([torch.randperm(TOKENS) for _ in range(HEADS)])
        got = attend(q, k, v, replace(plan_of(), order=Permutation(index)), backend=probe)
        for given, seen in zip((q, k, v), probe.seen[0], strict=False):
            for head in range(HEADS):
                assert torch.equal(seen[:, head], given[:, head, index[head]])
        assert torch.equal(got.out, q)
        assert torch.equal(got.lse, q[..., 0])

    def test_a_backend_that_reorders_gets_the_callers_order(self):
        probe, (q, k, v) = Probe(reorders=True), tensors()
        plan = replace(plan_of(), order=Permutation(torch.randperm(TOKENS)))
        assert attend(q, k, v, plan, backend=probe).out is q
        assert [given is seen for given, seen in zip((q, k, v), probe.seen[0], strict=False)] == [
            True
        ] * 3

    def test_the_default_scale(self):
        probe = Probe()
        attend(*tensors(), plan_of(), backend=probe)
        assert probe.seen[0][3] == 16**-0.5

    def test_the_plan_s_factor_comes_on_top_of_the_scale(self):
        probe = Probe()
        attend(*tensors(), replace(plan_of(), scale=1.5), scale=0.5, backend=probe)
        assert probe.seen[0][3] == 0.75

    def test_heads_of_queries_share_those_of_keys(self):
        """Query head h reads key head h // (H / H_k)."""
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, h, 24, 16, generator=generator) for h in (6, 2, 2))
        got = attend(q, k, v, plan_of())
        for head in range(6):
            of_key = slice(head // 3, head // 3 + 1)
            alone = attend(q[:, head : head + 1], k[:, of_key], v[:, of_key], plan_of())
            torch.testing.assert_close(got.out[:, head], alone.out[:, 0])
            torch.testing.assert_close(got.lse[:, head], alone.lse[:, 0])

    def test_a_given_backend_is_asked_too(self):
        probe = Probe(refusal="expected a Tuesday, got a Monday.")
        with pytest.raises(ValueError, match=r"probe: expected a Tuesday, got a Monday\."):
            attend(*tensors(), plan_of(), backend=probe)
        assert not probe.seen

    @pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
    def test_refuses_scales(self, scale: float):
        with pytest.raises(ValueError, match="Expected a scale above 0, got"):
            attend(*tensors(), plan_of(), scale=scale)

    @pytest.mark.parametrize(
        ("shapes", "sentence"),
        [
            ([(2, 24, 16)] * 3, r"Expected q \[B, H, N_q, D\]"),
            ([(2, 2, 24, 16), (2, 2, 24, 16), (2, 2, 23, 16)], "equal B and"),
            ([(2, 2, 24, 16), (2, 3, 24, 16), (2, 3, 24, 16)], "that divide those of q"),
            ([(2, 2, 24, 16), (2, 0, 24, 16), (2, 0, 24, 16)], "that divide those of q"),
            ([(1, 2, 24, 16), (2, 2, 24, 16), (2, 2, 24, 16)], "equal B and"),
            ([(2, 2, 24, 8), (2, 2, 24, 16), (2, 2, 24, 16)], "one head dim .* 8 and 16"),
            ([(2, 2, 25, 16)] * 3, "Expected 24 queries and 24 keys, got 25 and 25"),
            ([(2, 2, 24, 16), (2, 2, 30, 16), (2, 2, 30, 16)], "24 keys, got 24 and 30"),
        ],
    )
    def test_refuses_shapes(self, shapes: list[tuple[int, ...]], sentence: str):
        with pytest.raises(ValueError, match=sentence):
            attend(*map(torch.zeros, shapes), plan_of())

    def test_refuses_mixed_dtypes_and_devices(self):
        q, k, v = tensors()
        for mixed in ((q, k.half(), v.half()), (q, k, v.double()), (q.to("meta"), k, v)):
            with pytest.raises(ValueError, match=r"of one dtype on one device.* with \.to\(\)"):
                attend(*mixed, plan_of())

    @pytest.mark.parametrize(
        ("lead", "sentence"), [((3, 1), "a batch of 3.* got 2"), ((1, 5), "5 heads.* got 2")]
    )
    def test_refuses_plans_of_another_batch(self, lead: tuple[int, int], sentence: str):
        with pytest.raises(ValueError, match=sentence):
            attend(*tensors(), plan_of(lead=lead))

    def test_refuses_a_plan_on_another_device(self):
        with pytest.raises(ValueError, match=r"Move the plan with plan\.to"):
            attend(*(x.to("meta") for x in tensors()), plan_of())


GRID = TokenGrid(2, 3, 3)


@dataclass(frozen=True)
class Padded:
    """A layout and, by batch entry, the positions of its padding."""

    name: str
    layout: TokenLayout
    padding: tuple[tuple[int, ...], tuple[int, ...]]


LAYOUTS = [
    Padded("no text", TokenLayout((GRID,)), ((), ())),
    Padded("text, none padded", TokenLayout.of(GRID, 3, 4), ((), ())),
    Padded("text last", TokenLayout((GRID, TextSpan(5, (2, 2)))), ((20, 21, 22),) * 2),
    Padded(
        "text last, two lengths",
        TokenLayout((GRID, TextSpan(5, (5, 1)))),
        ((), (19, 20, 21, 22)),
    ),
    Padded("text first", TokenLayout((TextSpan(4, (1, 1)), GRID)), ((1, 2, 3),) * 2),
    Padded(
        "text first, two lengths", TokenLayout((TextSpan(4, (3, 0)), GRID)), ((3,), (0, 1, 2, 3))
    ),
    Padded(
        "two texts",
        TokenLayout((TextSpan(2, (1, 2)), GRID, TextSpan(3, (0, 2)))),
        ((1, 20, 21, 22), (22,)),
    ),
    Padded(
        "a reference image",
        TokenLayout((TextSpan(3, (2, 2)), GRID, TokenGrid(1, 2, 2))),
        ((2,), (2,)),
    ),
]


class TestDense:
    @pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
    @pytest.mark.parametrize("scale", [None, 0.6])
    def test_padding_is_never_read(self, case: Padded, scale: float | None):
        q, k, v = tensors(2, HEADS, case.layout.length, 8)
        mask = torch.ones(2, 1, 1, case.layout.length, dtype=torch.bool)
        for entry, positions in enumerate(case.padding):
            mask[entry, ..., list(positions)] = False
            k[entry, :, list(positions)] = v[entry, :, list(positions)] = float("nan")
        got = dense_attention(q, k, v, scale=scale, layout=case.layout)
        k, v = k.nan_to_num(), v.nan_to_num()
        expected = masked_attention(q, k, v, mask, scale)[0]
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)

    def test_without_a_layout(self):
        q, k, v = tensors()
        expected = masked_attention(q, k, v)[0]
        torch.testing.assert_close(
            dense_attention(q, k, v).double(), expected, rtol=1e-5, atol=1e-5
        )

    def test_equal_lengths_take_one_call_without_a_mask(self, monkeypatch: pytest.MonkeyPatch):
        """A mask that only says a length costs 40 % of dense throughput on a Hopper GPU."""
        calls = []
        stock = torch.nn.functional.scaled_dot_product_attention

        def watched(q, k, v, attn_mask=None, scale=None):
            calls.append((k.shape[2], attn_mask))
            return stock(q, k, v, attn_mask=attn_mask, scale=scale)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        layout = TokenLayout((GRID, TextSpan(5, (2, 2))))
        dense_attention(*tensors(2, 1, 23, 8), layout=layout)
        assert calls == [(20, None)]
        calls.clear()
        layout = TokenLayout((GRID, TextSpan(5, (2, 3))))
        dense_attention(*tensors(2, 1, 23, 8), layout=layout)
        assert calls == [(20, None), (21, None)]

    @pytest.mark.parametrize("additive", [False, True])
    def test_a_mask(self, additive: bool):
        q, k, v = tensors()
        mask = torch.rand(2, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(2)) < 0.5
        mask[..., 0] = True
        given = torch.zeros(mask.shape).masked_fill(~mask, float("-inf")) if additive else mask
        got = dense_attention(q, k, v, mask=given)
        expected = masked_attention(q, k, v, mask)[0]
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)

    def test_refuses_padding_beside_a_mask(self):
        q, k, v = tensors(2, 1, 23, 8)
        mask = torch.ones(2, 1, 1, 23, dtype=torch.bool)
        with pytest.raises(ValueError, match="a mask or a layout with padding, got both"):
            dense_attention(q, k, v, layout=TokenLayout((GRID, TextSpan(5, (2, 3)))), mask=mask)

    def test_refuses_lengths_of_another_batch(self):
        layout = TokenLayout((GRID, TextSpan(5, (2, 3, 5))))
        with pytest.raises(ValueError, match="text lengths for a batch of 2, got 3"):
            dense_attention(*tensors(2, HEADS, 23, 8), layout=layout)

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("valid", [(200, 200), (256, 3)])
    def test_on_a_gpu(self, dtype: torch.dtype, valid: tuple[int, int]):
        grid = TokenGrid(3, 30, 20)
        layout = TokenLayout((grid, TextSpan(256, valid)))
        q, k, v = (x.to("cuda", dtype) for x in tensors(2, 4, layout.length, 128))
        mask = torch.ones(2, 1, 1, layout.length, dtype=torch.bool, device="cuda")
        for entry, length in enumerate(valid):
            mask[entry, ..., grid.length + length :] = False
        expected = masked_attention(q, k, v, mask)[0]
        got = dense_attention(q, k, v, layout=layout).double()
        assert float((got - expected).norm() / expected.norm()) <= 1e-2
