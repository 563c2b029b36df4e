"""The Triton kernels in the interpreter: every variant, on tiny problems."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dit_sparse.attention import attend, select_backend
from dit_sparse.backend import AttentionOutput, Backend
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.method import CallContext
from dit_sparse.methods.window import WindowMethod
from dit_sparse.plan import BlockPlan, Blocks
from tests.block_cases import HEADS, LAYOUTS, Case, covering, plan_of, tensors_of
from tests.oracle import masked_attention
from tests.problems import Boxes

block_sparse = pytest.importorskip("dit_sparse.kernels.block_sparse")
rooms = pytest.importorskip("dit_sparse.kernels.rooms")
hopper = pytest.importorskip("dit_sparse.kernels.hopper")
launching = pytest.importorskip("dit_sparse.kernels.launch")
portable = pytest.importorskip("dit_sparse.kernels.portable")
tiles = pytest.importorskip("dit_sparse.kernels.tiles")

interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
specialised = pytest.mark.skipif(
    launching.TensorDescriptor is None, reason="needs tensor descriptors, of Triton 3.4 and later"
)

# Every choice of values for any three of these factors occurs in some case.
INTERPRETED = [
    Case(**values)
    for values in covering(
        {
            "head_dim": [32, 64, 72, 96, 128, 256],
            "q_block": [16, 32, 64, 128],
            "k_block": [16, 32, 64, 128],
            "dtype": [torch.float32, torch.float16],
            "ragged": [True, False],
            "box": [True, False],
            "order": ["none", "shared", "head"],
            "lists": ["shared", "head", "batch"],
            "tile": ["small", "whole"],
        },
        strength=3,
    )
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3}


def interpreted(keys: int | None = None, queries: int = 128) -> Backend:
    tile = None
    if keys is not None:
        tile = tiles.Tile(keys, warps=4, stages=1, tma=False, queries=queries)
    return block_sparse.TritonBackend(tile=tile, interpreted=True)


def check(got: AttentionOutput, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> None:
    """Compares with float64 on the same inputs."""
    out, lse = masked_attention(q, k, v, plan.to_mask())
    assert got.out.dtype == q.dtype
    assert got.lse.dtype == torch.float32
    tolerance = TOLERANCE[q.dtype]
    torch.testing.assert_close(got.out.double(), out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.lse.double(), lse, rtol=1e-5, atol=1e-5)
    empty = lse == -torch.inf
    assert not got.out[empty].any()


def nan_behind_empty_rows(box: bool) -> tuple[BlockPlan, Tensor, Tensor, Tensor, Tensor]:
    """A plan with q, k, v, and which queries read a key; v holds NaN in the first key block.

    Of four query blocks one reads nothing, one a whole block, one a whole block and another, and
    the last one nothing; with a box it lists the first key block, but the box shows none of it.
    """
    blocks = Blocks.uniform(4 * 128, 128)
    visited = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    visited[..., 1, 1] = visited[..., 2, 2] = visited[..., 2, 3] = True
    full, corners = None, None
    if box:
        visited[..., 3, 0] = True
        full = visited.clone()
        full[..., 2, 3] = full[..., 3, 0] = False
        place = torch.arange(512)
        corners = Boxes(
            bits=(10,),
            low=torch.zeros(1, 512, 1, dtype=torch.int64),
            high=(384 + place % 128 // 8 * 8)[None, :, None],
            key=torch.where(place < 128, 1000, place)[:, None],
            text=torch.zeros(512, dtype=torch.bool),
        ).packed()
    plan = BlockPlan.from_mask(visited, blocks, blocks, full=full, box=corners)
    q, k, v = tensors_of(Case(64, 128, 128, torch.float16), plan)
    v[:, :, :128] = float("nan")
    return plan, q, k, v, plan.to_mask().any(-1)[0, 0]


def check_beside_nan(
    got: AttentionOutput, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, read: Tensor
) -> None:
    """As `check`; the oracle has zeros in the place of NaN, which no row reads."""
    assert read.tolist() == [False] * 128 + [True] * 256 + [False] * 128
    assert bool((got.lse[..., ~read] == -torch.inf).all())
    assert bool((got.out[..., ~read, :] == 0).all())
    check(got, q, k, v.nan_to_num(0.0), plan)


def test_the_cases_cover_every_pair_of_blocks_with_every_head_dim():
    seen = {(c.head_dim, c.q_block, c.k_block) for c in INTERPRETED}
    assert len(seen) == 6 * 4 * 4
    pairs = itertools.product([True, False], [True, False], ["none", "shared", "head"])
    assert {(c.ragged, c.box, c.order) for c in INTERPRETED} == set(pairs)


@interpreter
class TestInterpreted:
    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize("case", INTERPRETED, ids=str)
    def test_every_variant(self, case: Case):
        plan = plan_of(case)
        assert plan.k_blocks.ragged == case.ragged
        q, k, v = tensors_of(case, plan)
        # Small tiles cut blocks of 64 and 128 queries too.
        backend = interpreted(case.tile_keys, 32 if case.tile == "small" else 128)
        check(attend(q, k, v, plan, backend=backend), q, k, v, plan)

    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize("head_dim", [16, 40, 128, 256])
    def test_the_tile_of_the_table(self, head_dim: int):
        case = Case(head_dim, 128, 128, torch.float16, order="head")
        plan = plan_of(case)
        q, k, v = tensors_of(case, plan)
        check(attend(q, k, v, plan, backend=interpreted()), q, k, v, plan)

    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize("order", ["none", "head"])
    def test_partial_entries_on_top_of_full_ones(self, order: str):
        """Where another kernel has computed the full entries, this one goes on from its result."""
        case = Case(64, 16, 128, order=order)
        plan = plan_of(case)
        q, k, v = tensors_of(case, plan)
        whole = replace(plan, partial=torch.zeros_like(plan.partial), box=None)
        assert bool(((plan.full == 0) & (plan.partial > 0)).any())
        assert bool(((plan.full > 0) & (plan.partial == 0)).any())
        result = attend(q, k, v, whole, backend=interpreted())
        if plan.order is not None:
            k, v = plan.order(k), plan.order(v)
        tile = tiles.Tile(32, warps=4, stages=1, tma=False)
        portable.launch(q, k, v, plan, 64**-0.5, tile, result, part="partial")
        if plan.order is not None:
            k, v = plan.order.undo(k), plan.order.undo(v)
        check(result, q, k, v, plan)

    @specialised
    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize("box", [False, True])
    @pytest.mark.parametrize("ragged", [False, True])
    @pytest.mark.parametrize("order", ["none", "head"])
    def test_the_specialised_kernel(
        self, box: bool, ragged: bool, order: str, monkeypatch: pytest.MonkeyPatch
    ):
        """The Hopper kernel's arithmetic; its schedule shows on a GPU alone."""
        case = Case(64, 128, 128, torch.float16, ragged=ragged, box=box, order=order)
        plan = plan_of(case)
        q, k, v = tensors_of(case, plan)
        room, _ = rooms.in_order(q, k, v, plan, queries=True, bounded=False)
        backend = block_sparse.TritonBackend(interpreted=True)
        monkeypatch.setattr(portable, "launch", None)  # it has no part in this
        launches = backend._specialised(room, plan, 64**-0.5)
        assert len(launches) == 1
        check(room.result, q, k, v, plan)

    @specialised
    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize("bounded", [False, True])
    def test_masks_that_are_no_product(self, bounded: bool):
        """The specialised kernel leaves masked entries to the other, after rows it could not do."""
        case = Case(64, 128, 128, torch.float16, order="head", bits=(2, 0, 3))
        plan = plan_of(case)
        assert plan.mask_product is None
        q, k, v = tensors_of(case, plan)
        q = q / 8
        q[:, 0, ::50] *= 1000
        room, _ = rooms.in_order(q, k, v, plan, queries=True, bounded=bounded)
        backend = block_sparse.TritonBackend(interpreted=True)
        assert len(backend._specialised(room, plan, 64**-0.5)) == 2 + bounded
        check(room.result, q, k, v, plan)

    @specialised
    @pytest.mark.parametrize("scale", [0.0, -0.125])
    def test_scales_under_which_nothing_would_be_hidden(self, scale: float):
        case = Case(64, 128, 128, torch.float16)
        plan = plan_of(case)
        assert hopper.mask_of(plan, 0.125) is plan.mask_product is not None
        assert hopper.mask_of(plan, scale) is None
        q, k, v = tensors_of(case, plan)
        room, _ = rooms.in_order(q, k, v, plan, queries=True, bounded=False)
        block_sparse.TritonBackend(interpreted=True)._specialised(room, plan, scale)
        out, lse = masked_attention(q, k, v, plan.to_mask(), scale)
        torch.testing.assert_close(room.result.out.double(), out, rtol=3e-3, atol=3e-3)
        torch.testing.assert_close(room.result.lse.double(), lse, rtol=1e-5, atol=1e-5)

    @specialised
    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize("text", [(0, 0), (150, 0), (0, 3), (3, 150)])
    def test_blocks_around_a_picture(self, text: tuple[int, int]):
        """Their query blocks come first."""
        layout = TokenLayout.of(TokenGrid(1, 21, 32), *text)
        method = WindowMethod(window=(12, 32), stride=(4, 32), tile=(4, 32))
        plan = method.plan(*[torch.empty(1)] * 2, CallContext(layout))
        assert 0 < len(plan.masked_rows) < len(plan.q_blocks.picture) == 6
        case = Case(64, 128, 128, torch.float16)
        q, k, v = tensors_of(case, plan)
        result = AttentionOutput(torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32))
        ordered = tuple(plan.order(x) for x in (q, k, v))
        assert plan.mask_product is not None
        assert hopper.launch(*ordered, plan, 64**-0.5, result, mask=plan.mask_product)
        check(result, q, k, v, plan)

    @specialised
    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize("box", [False, True])
    @pytest.mark.parametrize("ragged", [False, True])
    @pytest.mark.parametrize("order", ["none", "head"])
    def test_a_bound_instead_of_the_running_maximum(self, box: bool, ragged: bool, order: str):
        """Rows that the bound overtakes are marked, and computed again."""
        case = Case(64, 128, 128, torch.float16, ragged=ragged, box=box, order=order)
        plan = plan_of(case)
        q, k, v = tensors_of(case, plan)
        q = q / 8  # half precision holds no more of what stands below the bound
        q[:, 1] /= 32
        k[:, 1] *= 32  # heads differ in their longest key
        out_of_reach = torch.arange(0, q.shape[2], 50)
        q[:, 0, out_of_reach] *= 1000
        room, _ = rooms.in_order(q, k, v, plan, queries=True, bounded=True)
        (qo, ko, vo), result = room.ordered, room.result
        mask = plan.mask_product
        assert (mask is not None) == box
        assert hopper.launch(qo, ko, vo, plan, 64**-0.5, result, mask=mask, lengths=room.lengths)
        marked = result.lse == torch.inf
        seen = plan.to_mask().any(-1).expand_as(marked)
        assert 0 < (marked & seen).sum() <= 2 * len(out_of_reach)
        tile = tiles.Tile(32, warps=4, stages=1, tma=False, queries=64)
        portable.launch(q, ko, vo, plan, 64**-0.5, tile, result, part="repair")
        check(result, q, k, v, plan)

    @specialised
    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize("bounded", [False, True])
    def test_short_blocks_of_wide_heads(self, bounded: bool):
        case = Case(72, 128, 128, torch.float16, ragged=True, box=False)
        plan = plan_of(case)
        assert plan.k_blocks.ragged
        q, k, v = (x.contiguous() for x in tensors_of(case, plan))
        q = q / 8  # within reach of a bound in half precision
        room, _ = rooms.in_order(q, k, v, plan, queries=True, bounded=bounded)
        assert hopper.launch(q, k, v, plan, 72**-0.5, room.result, lengths=room.lengths)
        check(room.result, q, k, v, plan)

    @specialised
    def test_which_rows_a_bound_marks(self):
        """Those with less than 2^-85 of the weight that it allows; no others are repaired."""
        blocks = Blocks.uniform(4 * 128, 128)
        plan = BlockPlan.from_mask(torch.ones(1, 1, 4, 4, dtype=torch.bool), blocks, blocks)
        q, k, v = tensors_of(Case(64, 128, 128, torch.float16), plan)
        k[:, 1] *= 3
        q[:, :, 256:] *= torch.linspace(1, 30, 256)[:, None]
        q[:, 1, 256:] /= 3
        room, _ = rooms.in_order(q, k, v, plan, queries=True, bounded=True)
        result = room.result
        assert hopper.launch(q, k, v, plan, 64**-0.5, result, lengths=room.lengths)
        exact = masked_attention(q, k, v)[1]
        lengths, longest = q.double().norm(dim=-1), k.double().norm(dim=-1).amax(-1)
        below = (lengths * longest[..., None] * 64**-0.5 - exact) / math.log(2)
        clear = (below - 85).abs() > 0.5
        marked = result.lse == torch.inf
        assert torch.equal(marked[clear], (below > 85)[clear])
        assert bool(((below > 86) & (below < 95)).any())
        assert bool(((below > 75) & (below < 84)).any())
        torch.testing.assert_close(result.lse.double()[~marked], exact[~marked], rtol=0, atol=1e-3)
        again = marked.unflatten(-1, (4, 128)).any(-1).repeat_interleave(128, -1)
        assert 0 < again.sum() < again.numel()
        result.out[~again] = 7.0
        tile = tiles.Tile(32, warps=4, stages=1, tma=False)
        portable.launch(q, k, v, plan, 64**-0.5, tile, result, part="repair")
        assert bool((result.out[~again] == 7.0).all())
        torch.testing.assert_close(result.lse.double(), exact, rtol=0, atol=1e-3)

    @specialised
    def test_rows_without_a_number_are_marked(self):
        """Under a bound they are computed again with their block, whose other rows are right."""
        blocks = Blocks.uniform(2 * 128, 128)
        plan = BlockPlan.from_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), blocks, blocks)
        q, k, v = tensors_of(Case(64, 128, 128, torch.float16), plan)
        q = (q / 8).contiguous()
        broken = q.clone()
        broken[0, 0, 5] = torch.nan
        room, _ = rooms.in_order(broken, k, v, plan, queries=True, bounded=True)
        assert hopper.launch(broken, k, v, plan, 64**-0.5, room.result, lengths=room.lengths)
        marked = (room.result.lse == torch.inf).nonzero().tolist()
        assert marked == [[0, 0, 5]]
        tile = tiles.Tile(32, warps=4, stages=1, tma=False)
        portable.launch(broken, k, v, plan, 64**-0.5, tile, room.result, part="repair")
        out, lse = masked_attention(q, k, v)
        whole = torch.ones_like(lse, dtype=torch.bool)
        whole[0, 0, 5] = False
        torch.testing.assert_close(room.result.lse.double()[whole], lse[whole], rtol=0, atol=1e-3)
        close = {"rtol": 1e-2, "atol": 1e-2}
        torch.testing.assert_close(room.result.out.double()[whole], out[whole], **close)
        assert bool(room.result.out[0, 0, 5].isnan().all())

    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize("box", [False, True])
    @pytest.mark.parametrize("backend", ["triton", "reference"])
    def test_rows_that_read_nothing_see_no_nan(self, box: bool, backend: str):
        """Not even where lists are empty and any values might be multiplied by weights of 0."""
        plan, q, k, v, read = nan_behind_empty_rows(box)
        run = interpreted(32) if backend == "triton" else backend
        check_beside_nan(attend(q, k, v, plan, backend=run), q, k, v, plan, read)

    @specialised
    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize("box", [False, True])
    def test_rows_that_read_nothing_in_the_specialised_kernel(self, box: bool):
        plan, q, k, v, read = nan_behind_empty_rows(box)
        result = AttentionOutput(torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32))
        mask = plan.mask_product
        assert (mask is not None) == box
        assert hopper.launch(q, k, v, plan, 64**-0.5, result, mask=mask)
        check_beside_nan(result, q, k, v, plan, read)

    def test_another_scale(self):
        case = Case(32, 32, 64)
        plan = plan_of(case)
        q, k, v = tensors_of(case, plan)
        got = attend(q, k, v, plan, scale=0.7, backend=interpreted())
        out, lse = masked_attention(q, k, v, plan.to_mask(), 0.7)
        torch.testing.assert_close(got.out.double(), out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.lse.double(), lse, rtol=1e-5, atol=1e-5)

    def test_queries_and_keys_of_other_lengths(self):
        q_blocks, k_blocks = Blocks.of_runs([40, 9], 32), Blocks.of_runs([100, 64, 3], 64)
        visited = torch.rand(1, HEADS, q_blocks.n, k_blocks.n) < 0.6
        plan = BlockPlan.from_mask(visited, q_blocks, k_blocks)
        q, k, v = tensors_of(Case(32, 32, 64), plan)
        check(attend(q, k, v, plan, backend=interpreted()), q, k, v, plan)

    @pytest.mark.parametrize("value_dim", [16, 72, 128])
    @pytest.mark.parametrize("order", ["none", "head"])
    def test_values_of_another_width(self, value_dim: int, order: str):
        case = Case(64, 32, 64, order=order)
        plan = plan_of(case)
        q, k, v = tensors_of(case, plan, value_dim=value_dim)
        got = interpreted().run(q, k, v, plan, 64**-0.5)
        assert got.out.shape == (*q.shape[:3], value_dim)
        check(got, q, k, v, plan)

    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize("skipped", [3, 7])
    def test_runs_of_skipped_blocks(self, skipped: int):
        blocks = Blocks.of_runs([16 * 12, 5], 16)
        visited = torch.zeros(1, 1, blocks.n, blocks.n, dtype=torch.bool)
        for row in range(blocks.n):
            visited[..., row, row % 2 :: skipped + 1] = True
        visited[..., 4, :] = False
        visited[..., 5, :] = torch.arange(blocks.n) == blocks.n - 1  # the short last block alone
        plan = BlockPlan.from_mask(visited, blocks, blocks)
        q, k, v = tensors_of(Case(32, 16, 16), plan)
        check(attend(q, k, v, plan, backend=interpreted()), q, k, v, plan)

    def test_rows_may_share_entries_in_any_place(self):
        case = Case(32, 32, 32, order="shared")
        plan = plan_of(case)
        room = torch.zeros(7, dtype=torch.int32)
        twice = torch.cat([room, plan.indices, plan.indices])
        moved = plan.offsets + 7
        moved[1] += len(plan.indices)
        plan = replace(plan, indices=twice, offsets=moved)
        q, k, v = tensors_of(case, plan)
        check(attend(q, k, v, plan, backend=interpreted()), q, k, v, plan)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_extreme_scores(self, dtype: torch.dtype):
        case = Case(32, 32, 32, dtype, order="shared")
        plan = plan_of(case)
        q, k, v = tensors_of(case, plan)
        got = attend(q.sign() * 300, k.sign(), v, plan, scale=1.0, backend=interpreted())  # 1e4
        assert bool(got.out.isfinite().all())
        assert not bool(got.lse.isnan().any())
        out, lse = masked_attention(q.sign() * 300, k.sign(), v, plan.to_mask(), 1.0)
        torch.testing.assert_close(got.out.double(), out, rtol=5e-3, atol=5e-3)
        torch.testing.assert_close(got.lse.double(), lse, rtol=1e-6, atol=1e-3)

    def test_a_plan_is_selected_by_what_it_needs(self):
        case = Case(32, 32, 32)
        plan = plan_of(case)
        q, k, v = tensors_of(case, plan)
        backend, refusals = select_backend(q, k, v, plan)
        assert backend.name == "reference"
        assert refusals[0].startswith("triton: expected tensors on a GPU, got cpu")
        assert interpreted().name == "triton"
        assert interpreted().refuses(q, k, v, plan) is None
        assert isinstance(interpreted(), Backend)


@interpreter
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("order", ["none", "head"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str, order: str):
    case = Case(72, 32, 64, order=order, tile="whole")
    plan = plan_of(case)
    q, k, v = (LAYOUTS[layout](x) for x in tensors_of(case, plan))
    check(attend(q, k, v, plan, backend=interpreted()), q, k, v, plan)


@interpreter
@interpreter
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("order", ["none", "shared", "head"])
def test_heads_that_share_keys(order: str, box: bool):
    """Copied where they are put into order, and read as they are where they are not."""
    case = Case(32, 32, 64, order=order, box=box, lists="head")
    plan = plan_of(case)
    q, k, v = tensors_of(case, plan)
    one, many = (k[:, :1], v[:, :1]), (k[:, :1].expand_as(k), v[:, :1].expand_as(v))
    backend = interpreted(32)
    assert backend.groups(plan) == (order == "none")
    check(attend(q, *one, plan, backend=backend), q, *many, plan)


@interpreter
@specialised
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bounded", [False, True])
def test_heads_that_share_keys_in_the_specialised_kernel(bounded: bool):
    case = Case(64, 128, 128, torch.float16, box=False, lists="head")
    plan = plan_of(case)
    q, k, v = (x.contiguous() for x in tensors_of(case, plan))
    q, k, v = q / 8, k[:, 1:].contiguous(), v[:, 1:].contiguous()
    room, _ = rooms.in_order(q, k, v, plan, queries=True, bounded=bounded)
    assert room.ordered[1].shape[1] == 1
    assert hopper.launch(q, k, v, plan, 64**-0.5, room.result, lengths=room.lengths)
    check(room.result, q, k.expand_as(q), v.expand_as(q), plan)


@pytest.mark.parametrize("mixed", list(itertools.permutations(LAYOUTS, 3))[::29])
def test_strides_that_differ_between_q_k_and_v(mixed: tuple[str, str, str]):
    case = Case(32, 32, 64, order="shared")
    plan = plan_of(case)
    q, k, v = (LAYOUTS[n](x) for n, x in zip(mixed, tensors_of(case, plan), strict=True))
    check(attend(q, k, v, plan, backend=interpreted()), q, k, v, plan)


class TestRefusals:
    CASE = Case(32, 32, 32)

    def sentence(self, plan: BlockPlan, *tensors: Tensor) -> str | None:
        return interpreted().refuses(*tensors, plan)

    def test_a_cpu(self):
        plan = plan_of(self.CASE)
        q, k, v = tensors_of(self.CASE, plan)
        reason = block_sparse.TritonBackend().refuses(q, k, v, plan)
        assert reason == "expected tensors on a GPU, got cpu."

    def test_gradients(self):
        plan = plan_of(self.CASE)
        q, k, v = tensors_of(self.CASE, plan)
        k.requires_grad_()
        assert "got inputs that require gradients" in (self.sentence(plan, q, k, v) or "")
        with torch.no_grad():
            assert self.sentence(plan, q, k, v) is None

    def test_float64(self):
        plan = plan_of(self.CASE)
        q, k, v = (x.double() for x in tensors_of(self.CASE, plan))
        assert "expected bfloat16, float16 or float32, got torch.float64" in (
            self.sentence(plan, q, k, v) or ""
        )

    def test_more_heads_than_a_grid_has_programs(self):
        plan = plan_of(self.CASE)
        for heads, refused in ((256, True), (255, False)):
            q = torch.zeros(1, 1, 1, 1).expand(257, heads, 1, 64)
            found = self.sentence(plan, q, q, q) or ""
            assert ("at most 65535 heads of all batch entries, got 257 * 256" in found) == refused

    @pytest.mark.parametrize(("dim", "value_dim"), [(257, 64), (64, 512)])
    def test_wide_heads(self, dim: int, value_dim: int):
        plan = plan_of(self.CASE)
        q, k, v = (torch.zeros(1, 1, 1, d) for d in (dim, dim, value_dim))
        assert f"at most 256, got {max(dim, value_dim)}" in (self.sentence(plan, q, k, v) or "")

    @pytest.mark.parametrize(
        ("q_block", "k_block"), [(8, 64), (256, 64), (64, 8), (64, 512), (48, 64), (64, 96)]
    )
    def test_block_sizes(self, q_block: int, k_block: int):
        q_blocks, k_blocks = Blocks.uniform(20, q_block), Blocks.uniform(20, k_block)
        every = torch.ones(1, 1, q_blocks.n, k_blocks.n, dtype=torch.bool)
        plan = BlockPlan.from_mask(every, q_blocks, k_blocks)
        q, k, v = tensors_of(self.CASE, plan)
        assert f"powers of two, got {q_block} and {k_block}" in (self.sentence(plan, q, k, v) or "")

    @pytest.mark.parametrize(
        ("name", "room", "refused"),
        [
            ("sm_80", 166_912, {(256, torch.float32, 128)}),
            (
                "sm_86",
                101_376,
                {
                    (256, torch.float32, 128),
                    (256, torch.float32, 64),
                    (256, torch.float32, 32),
                    (128, torch.float32, 128),
                },
            ),
            ("sm_90", 232_448, set()),
            ("gfx942", 65_536, set()),
        ],
    )
    def test_more_than_the_shared_memory_of_the_device(
        self, monkeypatch: pytest.MonkeyPatch, name: str, room: int, refused: set
    ):
        """An A100, a consumer GPU, a Hopper one, an MI300: what does not fit fails at launch."""
        monkeypatch.setattr(block_sparse, "architecture", lambda device: name)
        monkeypatch.setattr(block_sparse.known_answers, "refusal", lambda *_: None)
        monkeypatch.setattr(block_sparse, "_shared_memory", lambda device: room)
        got = {}
        problems = itertools.product(
            [32, 64, 128, 200, 256], [torch.float32, torch.bfloat16], [16, 32, 64, 128]
        )
        for dim, dtype, block in problems:
            plan = plan_of(replace(self.CASE, q_block=block, k_block=128))
            with FakeTensorMode():
                q = torch.empty(1, HEADS, 40, dim, dtype=dtype, device="cuda")
                sentence = block_sparse.BACKEND.refuses(q, q, q, plan)
            if sentence is not None:
                got[dim, dtype, block] = sentence
        padded = {(200, *rest) for dim, *rest in refused if dim == 256}
        assert set(got) == refused | padded
        for (_, dtype, block), sentence in got.items():
            assert f"fit {room // 1024} KiB of shared memory" in sentence
            assert f"{dtype.itemsize} bytes and {block} tokens" in sentence

    @pytest.mark.parametrize(
        ("dim", "dtype", "refused"),
        [
            (128, torch.bfloat16, False),
            (200, torch.bfloat16, True),
            (64, torch.float32, False),
            (128, torch.float32, True),
        ],
    )
    def test_what_no_tile_is_for(
        self, monkeypatch: pytest.MonkeyPatch, dim: int, dtype: torch.dtype, refused: bool
    ):
        monkeypatch.setattr(block_sparse, "architecture", lambda device: "gfx1100")
        monkeypatch.setattr(block_sparse.known_answers, "refusal", lambda *_: None)
        monkeypatch.setattr(block_sparse, "_shared_memory", lambda device: 65_536)
        plan = plan_of(replace(self.CASE, q_block=128, k_block=128))
        with FakeTensorMode():
            q = torch.empty(1, HEADS, 40, dim, dtype=dtype, device="cuda")
            sentence = block_sparse.BACKEND.refuses(q, q, q, plan)
        assert ("head dim of at most 128 on gfx1100" in (sentence or "")) == refused
