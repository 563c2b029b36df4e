"""Plans of full, masked, biased and pooled entries: which kernel runs what, and the result."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.attention import attend, prepare
from dit_sparse.backend import AttentionOutput
from dit_sparse.plan import BlockPlan
from dit_sparse.plan_check import check
from dit_sparse.predicate import DiskPredicate
from dit_sparse.shares import any_plain
from tests.block_cases import HEADS, Case, plan_of, tensors_of
from tests.noted_launches import Run, noted
from tests.problems import pooled

block_sparse = pytest.importorskip("dit_sparse.kernels.block_sparse")
hopper = pytest.importorskip("dit_sparse.kernels.hopper")
hopper_gluon = pytest.importorskip("dit_sparse.kernels.hopper_gluon")
launching = pytest.importorskip("dit_sparse.kernels.launch")
portable = pytest.importorskip("dit_sparse.kernels.portable")
reference = pytest.importorskip("dit_sparse.kernels.reference")
rooms = pytest.importorskip("dit_sparse.kernels.rooms")

interpreter = pytest.mark.skipif(
    torch.cuda.is_available() or launching.TensorDescriptor is None,
    reason="needs Triton's interpreter, and tensor descriptors, of Triton 3.4 and later",
)


# Full entries alone; boxes that the specialised kernel masks, and boxes that it does not; disks;
# words.
MASKS = ["none", "box", "boxes of many classes", "disk", "words"]


def mixed(
    case: Case, mask: str, *, bias: bool, pools: bool = False, tail: str = "none"
) -> BlockPlan:
    """A random plan. A fourth of the entries have a bias, some -inf; so have all of two rows."""
    bits = (2, 0, 3) if mask == "boxes of many classes" else (2, 0, 2)
    case = replace(case, box=mask != "none", bits=bits)
    generator = torch.Generator().manual_seed(3)
    plan = plan_of(case)
    if pools:
        plan = pooled(plan, (4, 16), None, generator)
    entries, total = plan.indices.numel(), plan.q_blocks.total
    if mask == "words":
        shape = (entries, -(-plan.k_blocks.size // 32))
        words = torch.randint(-(2**31), 2**31, shape, generator=generator).int()
        words[::5] = 0
        plan = replace(plan, box=None, words=words)
    if mask == "disk":
        heads = 1 if case.lists == "shared" else HEADS

        def place(*shape: int) -> Tensor:
            rows, columns = torch.randint(8, (2, *shape), generator=generator)
            return (rows * 65536 + columns).int()

        limit = torch.randint(1, 60, (heads, total), generator=generator).int()
        plan = replace(plan, box=None, disk=DiskPredicate(place(heads, total), limit, place(total)))
    if bias:
        biases = 3 * torch.randn(entries, generator=generator)
        kind = torch.rand(entries, generator=generator)
        biases = biases.masked_fill(kind > 0.25, 0.0).masked_fill(kind < 0.07, -torch.inf)
        offsets, count = plan.offsets.flatten(), (plan.full + plan.partial).flatten()
        for row, value in ((1, 1.5), (2, -torch.inf)):
            biases[offsets[row] : offsets[row] + count[row]] = value
        plan = replace(plan, bias=biases)
    return check(replace(plan, tail=tail))


def entries_of(plan: BlockPlan, part: str, *, plain: bool) -> Tensor:
    """bool `[B, H, n_q, n_k]`, with `plain` only those without a bias, one by one."""
    found = torch.zeros(*plan.offsets.shape, plan.k_blocks.n, dtype=torch.bool)
    for row in torch.cartesian_prod(*map(torch.arange, plan.offsets.shape)).tolist():
        first, full, masked = (int(x[tuple(row)]) for x in (plan.offsets, plan.full, plan.partial))
        begin, count = (first, full) if part == "full" else (first + full, masked)
        for entry in range(begin, begin + count):
            if not plain or plan.bias is None or float(plan.bias[entry]) == 0.0:
                found[(*row, int(plan.indices[entry]))] = True
    return found


def check_runs(runs: list[Run], plan: BlockPlan, mask: str, bounded: bool) -> None:
    """The specialised kernel has all entries that it can run, and the portable one the rest."""
    runs = [(name, x.to("cpu")) for name, x in runs]
    plan, by_product = plan.to("cpu"), mask == "box"
    names = [name for name, _ in runs]
    main = runs[0][1]
    if names[0] == "gluon":
        left = mask in ("boxes of many classes", "disk")
        repair = "repair full" if left else "repair"
        assert names[1:] == [repair] * bounded + ["partial"] * left
        weighing = (
            plan if plan.bias is None else replace(plan, bias=(plan.bias == -torch.inf) * 1.0)
        )
        for part in ("full", "partial"):
            assert torch.equal(main.listed(part), entries_of(weighing, part, plain=True))
        for _, run in runs[1:]:  # with all biases and words, as far as they are not copies
            assert torch.equal(run.indices, main.indices)
            assert (run.bias is None) == (plan.bias is None)
            assert (run.words is None) == (plan.words is None)
        return
    assert names[0] == "hopper"
    assert main.bias is None
    assert torch.equal(main.listed("full"), entries_of(plan, "full", plain=True))
    left = plan.bias is not None or mask not in ("none", "box")
    repair = "repair full" if left and plan.bias is None else "repair"
    added = "partial" if plan.bias is None else "added"
    assert names[1:] == [repair] * bounded + [added] * left
    if plan.bias is None or not left:
        return
    if by_product:
        assert torch.equal(main.listed("partial"), entries_of(plan, "partial", plain=True))
    else:
        assert not bool(main.partial.any())
    rest = runs[-1][1]
    assert rest.bias is not None
    weighing = replace(plan, bias=torch.where(plan.bias == -torch.inf, 0.0, 1.0))
    for part in ("full", "partial"):
        nothing = entries_of(weighing, part, plain=True)
        expected = entries_of(plan, part, plain=False) & ~main.listed(part) & ~nothing
        assert torch.equal(rest.listed(part), expected)


def check_result(
    got: AttentionOutput, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, tolerance: float
) -> None:
    """Against the reference in float64, row by row of what it reads."""
    exact = attend(q.double(), k.double(), v.double(), plan, backend=reference.BACKEND)
    seen = exact.lse > -torch.inf
    assert int((~seen).sum()) > 0 or plan.tail != "none"
    error = (got.out.double() - exact.out)[seen].norm() / exact.out[seen].norm()
    assert float(error) <= tolerance
    torch.testing.assert_close(got.lse[seen], exact.lse[seen], rtol=1e-5, atol=2e-3)
    assert not got.out[~seen].any()
    assert bool((got.lse[~seen] == -torch.inf).all())


def as_in_gluon(
    rows: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float,
    result: AttentionOutput, *, mask: Any, lengths: Any,
) -> object:  # fmt: skip
    """What the kernel in Gluon does, by the reference.

    Args:
        rows: bool `[B, H, N]`, which it marks under a bound, in the order of the results.
    """
    lists = replace(plan, pools=None, tail="none", hidden=None, order=None)
    if mask is None and plan.words is None:
        none = torch.zeros_like(plan.partial)
        lists = replace(lists, partial=none, box=None, disk=None)
    found = reference.BACKEND.run(q.double(), k.double(), v.double(), lists, scale)
    out, lse = found if plan.order is None else map(plan.order.undo, found)
    if lengths is not None:
        marked = rows & (lse > -torch.inf)
        out, lse = out.masked_fill(marked[..., None], 7.0), lse.masked_fill(marked, torch.inf)
    result.out.copy_(out)
    result.lse.copy_(lse)
    return object()


@interpreter
@pytest.mark.usefixtures("poisoned")
class TestInterpreted:
    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("bounded", [False, True])
    @pytest.mark.parametrize(
        "case",
        [
            Case(64, 128, 128, torch.float16, order="head", lists="head"),
            Case(72, 128, 128, torch.float16, False, order="none", tokens=640),
        ],
        ids=str,
    )
    def test_one_kernel_for_all_entries(
        self, mask: str, bias: bool, bounded: bool, case: Case, monkeypatch: pytest.MonkeyPatch
    ):
        plan = mixed(case, mask, bias=bias)
        q, k, v = tensors_of(case, plan)
        room, _ = rooms.in_order(q, k, v, plan, queries=True, bounded=bounded)
        rows = torch.zeros(q.shape[:3], dtype=torch.bool)
        rows[:, 0, ::50] = True
        monkeypatch.setattr(hopper_gluon, "refuses", lambda *_: None)
        monkeypatch.setattr(hopper_gluon, "launch", partial(as_in_gluon, rows))
        runs = noted(monkeypatch)
        backend = block_sparse.TritonBackend(kernel="hopper_gluon", interpreted=True)
        launches = backend._specialised(room, plan, case.head_dim**-0.5)
        assert len(launches) == len(runs)
        assert runs[0][0] == "gluon"
        check_runs(runs, plan, mask, bounded)
        check_result(room.result, q, k, v, plan, 3e-3)

    @pytest.mark.parametrize("refused", [False, True])
    @pytest.mark.parametrize("mask", ["box", "words"])
    def test_two_kernels_where_that_in_gluon_cannot_run(
        self, refused: bool, mask: str, monkeypatch: pytest.MonkeyPatch
    ):
        """By what it refuses, or as its launch finds."""
        case = Case(64, 128, 128, torch.float16, order="head", lists="head")
        plan = mixed(case, mask, bias=True)
        q, k, v = tensors_of(case, plan)
        room, _ = rooms.in_order(q, k, v, plan, queries=True, bounded=False)
        monkeypatch.setattr(hopper_gluon, "refuses", lambda *_: "so" if refused else None)
        monkeypatch.setattr(hopper_gluon, "launch", lambda *_, **__: None)
        runs = noted(monkeypatch)
        backend = block_sparse.TritonBackend(kernel="hopper_gluon", interpreted=True)
        backend._specialised(room, plan, case.head_dim**-0.5)
        check_runs(runs, plan, mask, False)
        check_result(room.result, q, k, v, plan, 3e-3)

    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize(
        ("bounded", "case"),
        [
            (False, Case(64, 128, 128, torch.float16, order="head", lists="head")),
            (True, Case(64, 128, 128, torch.float16, lists="batch")),
            (True, Case(72, 128, 128, torch.float16, False, order="shared", tokens=640)),
        ],
        ids=str,
    )
    def test_exact_entries(
        self, mask: str, bias: bool, bounded: bool, case: Case, monkeypatch: pytest.MonkeyPatch
    ):
        plan = mixed(case, mask, bias=bias)
        q, k, v = tensors_of(case, plan)
        q = q / 8  # half precision holds no more of what stands below the bound
        q[:, 0, ::50] *= 1000
        room, _ = rooms.in_order(q, k, v, plan, queries=True, bounded=bounded)
        runs = noted(monkeypatch)
        backend = block_sparse.TritonBackend(interpreted=True)
        assert any_plain(plan)
        launches = backend._specialised(room, plan, case.head_dim**-0.5)
        assert len(launches) == len(runs)
        check_runs(runs, plan, mask, bounded)
        check_result(room.result, q, k, v, plan, 3e-3)

    @pytest.mark.parametrize("mask", ["box", "words"])
    @pytest.mark.parametrize("tail", ["none", "zeroth", "block"])
    def test_beside_pooled_entries_and_tails(
        self, mask: str, tail: str, monkeypatch: pytest.MonkeyPatch
    ):
        case = Case(64, 128, 128, torch.float16, order="shared", lists="batch")
        plan = mixed(case, mask, bias=True, pools=True, tail=tail)
        q, k, v = tensors_of(case, plan)
        room, _ = rooms.in_order(q, k, v, plan, queries=True, bounded=False)
        runs = noted(monkeypatch)
        scale = case.head_dim**-0.5
        block_sparse.TritonBackend(interpreted=True)._specialised(room, plan, scale)
        check_runs(runs, plan, mask, False)
        block_sparse._approximate(plan, scale, True, tail != "none", room)
        check_result(room.result, q, k, v, plan, 3e-3)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
class TestOnAGPU:
    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("bounded", [False, True])
    @pytest.mark.parametrize(
        ("head_dim", "order", "lists"), [(128, "head", "head"), (64, "none", "batch")]
    )
    def test_exact_entries(
        self,
        mask: str,
        bias: bool,
        bounded: bool,
        head_dim: int,
        order: str,
        lists: str,
        monkeypatch: pytest.MonkeyPatch,
    ):
        case = Case(head_dim, 128, 128, torch.bfloat16, order=order, lists=lists, tokens=2304)
        plan = mixed(case, mask, bias=bias).to("cuda")
        q, k, v = tensors_of(case, plan, "cuda")
        q[:, :, ::300] *= 100
        if not hopper.runs(q, v, plan) or not hopper.masks(q):
            pytest.skip("needs a GPU that the specialised kernel was built for")
        backend = block_sparse.TritonBackend(bound=bounded)
        monkeypatch.setattr("dit_sparse.attention.backends", lambda precision="bf16": (backend,))
        runs = noted(monkeypatch)
        got, prepared = prepare(q, k, v, plan)
        check_runs(runs, plan, mask, bounded)
        check_result(got, q, k, v, plan, 1e-2)
        runs.clear()
        check_result(prepared.again(q, k, v), q, k, v, plan, 1e-2)
        assert not runs  # what was launched is launched again, without looking for it

    @pytest.mark.parametrize("mask", ["box", "words"])
    @pytest.mark.parametrize("tail", ["none", "zeroth", "first", "block"])
    def test_beside_pooled_entries_and_tails(
        self, mask: str, tail: str, monkeypatch: pytest.MonkeyPatch
    ):
        case = Case(128, 128, 128, torch.bfloat16, order="shared", lists="batch", tokens=2304)
        plan = mixed(case, mask, bias=True, pools=True, tail=tail).to("cuda")
        q, k, v = tensors_of(case, plan, "cuda")
        if not hopper.runs(q, v, plan) or not hopper.masks(q):
            pytest.skip("needs a GPU that the specialised kernel was built for")
        runs = noted(monkeypatch)
        got = attend(q, k, v, plan, backend=block_sparse.TritonBackend(bound=True))
        check_runs(runs, plan, mask, True)
        check_result(got, q, k, v, plan, 1e-2)

    @pytest.mark.parametrize("kernel", ["hopper", "hopper_gluon"])
    def test_no_plain_entries(self, kernel: str, monkeypatch: pytest.MonkeyPatch):
        case = Case(128, 128, 128, torch.bfloat16, tokens=900, box=False)
        plan = plan_of(case)
        plan = check(replace(plan, bias=torch.full(plan.indices.shape, 0.5))).to("cuda")
        q, k, v = tensors_of(case, plan, "cuda")
        runs = noted(monkeypatch)
        backend = block_sparse.TritonBackend(kernel=kernel)
        got = attend(q, k, v, plan, backend=backend)
        whole = hopper.runs(q, v, plan) and backend._marks(q, plan, 1.0)
        assert [name for name, _ in runs] == ["gluon" if whole else "all"]
        check_result(got, q, k, v, plan, 1e-2)
