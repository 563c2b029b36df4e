"""The Triton kernels at real sizes, on a GPU."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.attention import attend, prepare, select_backend
from dit_sparse.backend import AttentionOutput
from dit_sparse.grid import Permutation, TokenGrid, TokenLayout
from dit_sparse.method import CallContext
from dit_sparse.methods.window import WindowMethod
from dit_sparse.neighbourhood import Neighbourhood
from dit_sparse.plan import BlockPlan, Blocks
from dit_sparse.window_plan import plan_windows
from tests.block_cases import LAYOUTS, Case, covering, plan_of, tensors_of
from tests.noted_launches import noted
from tests.oracle import masked_attention

block_sparse = pytest.importorskip("dit_sparse.kernels.block_sparse")
hopper = pytest.importorskip("dit_sparse.kernels.hopper")
tiles = pytest.importorskip("dit_sparse.kernels.tiles")

# On a GPU every case compiles anew, so here any two factors.
COMPILED = [
    Case(**values)
    for values in covering(
        {
            "head_dim": [32, 64, 72, 88, 96, 128, 256],
            "q_block": [64, 128],
            "k_block": [64, 128],
            "dtype": [torch.bfloat16, torch.float16],
            "ragged": [True, False],
            "box": [True, False],
            "bits": [(2, 0, 2), (2, 0, 3)],
            "order": ["none", "shared", "head"],
            "lists": ["shared", "head", "batch"],
            "tokens": [700, 2304, 5000],
        },
        strength=2,
    )
]

WHOLE = [case for case in COMPILED if case.q_block == case.k_block == 128 and case.head_dim <= 128]


def test_the_cases_cover_every_block_with_every_head_dim():
    dims = [32, 64, 72, 88, 96, 128, 256]
    for block in ("q_block", "k_block"):
        seen = {(case.head_dim, getattr(case, block)) for case in COMPILED}
        assert seen == set(itertools.product(dims, [64, 128]))


def relative_error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


def check_on_gpu(got: AttentionOutput, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> None:
    """At most 1e-2 from float64, and at most twice as far as PyTorch's masked attention."""
    mask = plan.to_mask()
    exact, lse = masked_attention(q, k, v, mask)
    seen = lse > -torch.inf
    stock = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(*q.shape[:2], -1, -1))
    error = relative_error(got.out[seen], exact[seen])
    assert error <= 1e-2
    assert error <= 2 * relative_error(stock[seen], exact[seen])
    # Adversarial scores reach 10,000, where float32 itself is a thousandth apart.
    torch.testing.assert_close(got.lse.double()[seen], lse[seen], rtol=1e-6, atol=1e-3)
    assert not got.out[~seen].any()
    assert bool((got.lse[~seen] == -torch.inf).all())


def on_gpu(case: Case) -> tuple[BlockPlan, tuple[Tensor, Tensor, Tensor]]:
    plan = plan_of(case).to("cuda")
    return plan, tensors_of(case, plan, "cuda")


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
class TestCompiled:
    @pytest.mark.parametrize("case", COMPILED, ids=str)
    def test_every_variant(self, case: Case):
        plan, (q, k, v) = on_gpu(case)
        backend, refusals = select_backend(q, k, v, plan)
        assert (backend.name, refusals) == ("triton", ())
        check_on_gpu(attend(q, k, v, plan, backend=backend), q, k, v, plan)

    @pytest.mark.parametrize("case", WHOLE, ids=str)
    def test_the_hopper_kernel_behind_the_tables_choice(self, case: Case, monkeypatch):
        """Which runs where the kernel in Gluon refuses, and with other versions of Triton."""
        plan, (q, k, v) = on_gpu(case)
        if not hopper.runs(q, v, plan):
            pytest.skip("needs a GPU and a head dim that the specialised kernel was built for")
        runs, backend = noted(monkeypatch), block_sparse.TritonBackend(kernel="hopper")
        check_on_gpu(attend(q, k, v, plan, backend=backend), q, k, v, plan)
        # Rows that begin at no multiple of 16 elements take more registers to read: it may spill
        # then, and is refused.
        spills = case.head_dim % 16 and case.order != "none"
        assert runs[0][0] in ({"hopper", "all"} if spills else {"hopper"})

    @pytest.mark.parametrize("kernel", [None, "hopper"])
    @pytest.mark.parametrize("block", [64, 128])
    @pytest.mark.parametrize("box", [False, True])
    @pytest.mark.parametrize("order", ["none", "head"])
    @pytest.mark.parametrize("bound", [False, True])
    def test_repeated_launches(
        self, kernel, block: int, box: bool, order: str, bound: bool, monkeypatch
    ):
        backend = block_sparse.TritonBackend(kernel=kernel, bound=bound)
        monkeypatch.setattr("dit_sparse.attention.backends", lambda precision="bf16": (backend,))
        case = Case(64, block, block, torch.bfloat16, box=box, order=order, tokens=2304)
        plan, (q, k, v) = on_gpu(case)
        first, prepared = prepare(q, k, v, plan)
        assert prepared.again.func is block_sparse._again
        launches = prepared.again.args[0]
        assert all(launch.direct is not None for launch in launches)  # what they gain is host time
        check_on_gpu(first, q, k, v, plan)
        # A clone keeps the strides, which `roll` does not: other strides are another kind.
        q, k, v = (x.clone().copy_(x.roll(7, dims=2)) for x in (q, k, v))
        check_on_gpu(prepared.again(q, k, v), q, k, v, plan)

    @pytest.mark.parametrize("order", ["none", "head"])
    def test_in_other_threads(self, order: str):
        """Which begin without a CUDA context, and share what was made ready."""
        case = Case(128, 128, 128, torch.bfloat16, box=False, order=order, tokens=2304)
        plan, inputs = on_gpu(case)
        _, prepared = prepare(*inputs, plan)
        many = [tuple(x.clone().copy_(x.roll(n, dims=2)) for x in inputs) for n in range(4)]
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(prepared.again, *many[n % 4]) for n in range(40)]
            found = [future.result() for future in futures]
        torch.cuda.synchronize()
        for n, got in enumerate(found):
            assert all(map(torch.equal, got, attend(*many[n % 4], plan)))

    @pytest.mark.parametrize("box", [False, True])
    @pytest.mark.parametrize("order", ["none", "head"])
    def test_in_a_cuda_graph(self, box: bool, order: str):
        case = Case(128, 128, 128, torch.bfloat16, box=box, order=order, tokens=2304)
        plan, (q, k, v) = on_gpu(case)
        _, prepared = prepare(q, k, v, plan)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            prepared.again(q, k, v)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = prepared.again(q, k, v)
        for tensor in (q, k, v):
            tensor.copy_(tensor.roll(7, dims=2))
        got.out.fill_(torch.nan)
        graph.replay()
        check_on_gpu(got, q, k, v, plan)

    @pytest.mark.parametrize("head_dim", [64, 72, 128])
    @pytest.mark.parametrize("box", [False, True])
    @pytest.mark.parametrize("ragged", [False, True])
    def test_a_bound_instead_of_the_running_maximum(self, head_dim: int, box: bool, ragged: bool):
        """Some rows' scores are far below their bound, and some far apart."""
        case = Case(head_dim, 128, 128, torch.bfloat16, ragged, box, "head", tokens=2304)
        plan, (q, k, v) = on_gpu(case)
        q[:, :, ::300] *= 300
        k[:, :, 700:702] *= 20
        backend = block_sparse.TritonBackend(bound=True)
        check_on_gpu(attend(q, k, v, plan, backend=backend), q, k, v, plan)

    @pytest.mark.parametrize("case", COMPILED[::3], ids=str)
    @pytest.mark.parametrize("tma", [False, True])
    def test_the_portable_kernel(self, case: Case, tma: bool):
        if tma and torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("tensor descriptors need compute capability 9.0")
        plan, (q, k, v) = on_gpu(case)
        backend = block_sparse.TritonBackend(tile=tiles.Tile(32, warps=4, stages=2, tma=tma))
        check_on_gpu(attend(q, k, v, plan, backend=backend), q, k, v, plan)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("head_dim", [64, 72, 128])
    @pytest.mark.parametrize("order", ["none", "head"])
    @pytest.mark.parametrize("box", [False, True])
    def test_strides(self, layout: str, head_dim: int, order: str, box: bool):
        case = Case(head_dim, 128, 128, torch.bfloat16, order=order, box=box, tokens=900)
        plan, tensors = on_gpu(case)
        q, k, v = (LAYOUTS[layout](x) for x in tensors)
        check_on_gpu(attend(q, k, v, plan, backend="triton"), q, k, v, plan)

    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_float32(self, head_dim: int):
        case = Case(head_dim, 64, 64, torch.float32, order="head", tokens=1000)
        plan, (q, k, v) = on_gpu(case)
        got = attend(q, k, v, plan, backend="triton")
        exact = masked_attention(q, k, v, plan.to_mask())
        torch.testing.assert_close(got.out.double(), exact[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.lse.double(), exact[1], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("value_dim", [64, 96])
    def test_values_of_another_width(self, value_dim: int):
        case = Case(128, 128, 128, torch.bfloat16, tokens=900)
        plan = plan_of(case).to("cuda")
        q, k, v = tensors_of(case, plan, "cuda", value_dim)
        got = block_sparse.BACKEND.run(q, k, v, plan, 128**-0.5)
        check_on_gpu(got, q, k, v, plan)

    @pytest.mark.parametrize("box", [False, True])
    @pytest.mark.parametrize("k_block", [64, 128])
    def test_runs_repeat_bit_for_bit(self, box: bool, k_block: int):
        case = Case(128, 128, k_block, torch.bfloat16, box=box, order="head", tokens=5000)
        plan, (q, k, v) = on_gpu(case)
        first = attend(q, k, v, plan, backend="triton")
        for _ in range(19):
            again = attend(q, k, v, plan, backend="triton")
            assert torch.equal(again.out, first.out)
            assert torch.equal(again.lse, first.lse)

    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("bound", [False, True])
    def test_a_hundred_large_calls_are_equal(self, head_dim: int, masked: bool, bound: bool):
        """A few rows of a large call once were not finite, and in the next call they were."""
        layout = TokenLayout.of(TokenGrid(1, 128, 128), text_first=512)
        strides = (1, 1, 1) if masked else (1, 8, 16)
        method = WindowMethod(window=(1, 56, 48), stride=strides, tile=(1, 8, 16))
        shape = (1, 24, layout.length, head_dim)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        plan = method.plan(q, k, CallContext(layout))
        assert (plan.box is not None) == masked
        portable = block_sparse.TritonBackend(tile=tiles.Tile(64, warps=8, stages=2, tma=False))
        exact = attend(q, k, v, plan, backend=portable)
        backend = block_sparse.TritonBackend(bound=bound)
        first = attend(q, k, v, plan, backend=backend)
        assert relative_error(first.out, exact.out.double()) <= 1e-2
        torch.testing.assert_close(first.lse, exact.lse, rtol=0, atol=1e-3)
        for _ in range(100):
            again = attend(q, k, v, plan, backend=backend)
            assert torch.equal(again.out, first.out)
            assert torch.equal(again.lse, first.lse)

    @pytest.mark.parametrize("seed", range(12))
    def test_windows(self, seed: int):
        """Of one kind for all heads or one for each, with text and short blocks."""
        draw = random.Random(seed)
        extents = (draw.choice([1, 5]), draw.randint(9, 30), draw.randint(9, 30))
        dilation = [draw.choice([1, 1, 2]) if extent > 1 else 1 for extent in extents]
        causal = [draw.random() < 0.2 for _ in extents]

        def axis(extent: int, dilated: int, causal: bool) -> Neighbourhood:
            window = draw.randint(1, extent // dilated)
            return Neighbourhood(extent, window, draw.randint(1, window), dilated, causal=causal)

        kinds = draw.choice([1, 3])
        heads = [tuple(map(axis, extents, dilation, causal)) for _ in range(kinds)]
        text = (draw.choice([0, 140]), draw.choice([0, 9]))
        layout = TokenLayout.of(TokenGrid(*extents), *text)
        tile = (draw.choice([1, 2]), 7, 8) if draw.random() < 0.5 else (1, 8, 16)
        plan = plan_windows(layout, heads, tile, 128, torch.device("cuda"))
        assert (plan.mask_product is None) == (not bool(plan.partial.any()))
        dtype = torch.float16 if seed % 4 == 3 else torch.bfloat16
        shape = (2, 3, layout.length, draw.choice([64, 88, 128]))
        q, k, v = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3))
        backend = block_sparse.TritonBackend(bound=bool(seed % 2))
        check_on_gpu(attend(q, k, v, plan, backend=backend), q, k, v, plan)

    @pytest.mark.parametrize("skipped", [3, 7])
    def test_runs_of_skipped_blocks(self, skipped: int):
        blocks = Blocks.of_runs([128 * 12, 5], 128, "cuda")
        visited = torch.zeros(1, 1, blocks.n, blocks.n, dtype=torch.bool, device="cuda")
        for row in range(blocks.n):
            visited[..., row, row % 2 :: skipped + 1] = True
        visited[..., 4, :] = False
        visited[..., 5, :] = torch.arange(blocks.n, device="cuda") == blocks.n - 1
        plan = BlockPlan.from_mask(visited, blocks, blocks)
        q, k, v = tensors_of(Case(64, 128, 128, torch.bfloat16), plan, "cuda")
        check_on_gpu(attend(q, k, v, plan, backend="triton"), q, k, v, plan)

    def test_another_gpu_than_the_current_one(self):
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        case = Case(64, 128, 128, torch.bfloat16, order="head", tokens=900)
        plan = plan_of(case).to("cuda:1")
        q, k, v = tensors_of(case, plan, "cuda:1")
        check_on_gpu(attend(q, k, v, plan, backend="triton"), q, k, v, plan)


@pytest.mark.gpu
@pytest.mark.parametrize("ordered", [False, True])
def test_more_elements_than_int32_counts(ordered: bool):
    """Two key blocks for each query block, so that only the addresses are large."""
    tokens, heads, dim = 2**17 + 19, 130, 128
    assert heads * tokens * dim > 2**31
    need = 4 * (3 + ordered) * heads * tokens * dim  # x, the result, and reordered copies
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of free GPU memory")
    blocks = Blocks.uniform(tokens, 128, "cuda")
    visited = torch.zeros(1, 1, blocks.n, blocks.n, dtype=torch.bool, device="cuda")
    visited[..., 0] = visited[..., -1] = True
    order = Permutation(torch.arange(tokens, device="cuda").flip(0)) if ordered else None
    plan = BlockPlan.from_mask(visited, blocks, blocks, order=order)
    memory = torch.randn(heads * tokens * dim, dtype=torch.bfloat16, device="cuda")
    for x in (
        memory.view(1, heads, tokens, dim),
        memory.view(1, tokens, heads, dim).transpose(1, 2),
    ):
        out, lse = attend(x, x, x, plan, backend="triton")
        ends = torch.cat([torch.arange(128), torch.arange(tokens - 19, tokens)]).cuda()
        if ordered:
            ends = tokens - 1 - ends
        last = x[:, -1:]
        rows = torch.arange(tokens - 200, tokens, device="cuda")
        exact = masked_attention(last[:, :, rows], last[:, :, ends], last[:, :, ends])
        assert relative_error(out[:, -1:, rows], exact[0]) <= 1e-2
        torch.testing.assert_close(lse[:, -1:, rows].double(), exact[1], rtol=0, atol=1e-3)
        del out, lse
