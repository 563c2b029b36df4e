"""The Hopper kernel in Gluon: its source run as Python, what it refuses, and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.attention import attend
from dit_sparse.backend import AttentionOutput
from dit_sparse.grid import Permutation
from dit_sparse.plan import BlockPlan, Blocks
from dit_sparse.plan_check import check as check_plan
from dit_sparse.shares import highest, weighing
from tests.gluon_model import launched
from tests.oracle import masked_attention
from tests.problems import Boxes

hopper_gluon = pytest.importorskip("dit_sparse.kernels.hopper_gluon")
dealt = pytest.importorskip("dit_sparse.kernels.dealt")
TritonBackend = pytest.importorskip("dit_sparse.kernels.block_sparse").TritonBackend
if hopper_gluon._block_sparse_fwd_hopper_gluon is None:
    pytest.skip("needs a Triton with Gluon", allow_module_level=True)

HERE = Path(hopper_gluon.__file__)
FILES = ("gluon_fetch", "gluon_rows", "gluon_weights", "hopper_gluon")
SOURCES = [HERE.with_name(f"_{name}.py") for name in FILES]
HEADS = 3


def plan_of(
    seed: int, *, ragged: bool, order: str, uneven: bool, boxes: int | None = None
) -> BlockPlan:
    """Random lists, with none, with one entry and with all.

    Args:
        boxes: how many heads have some of their own, which mask half of the entries.
    """
    generator = torch.Generator().manual_seed(seed)
    runs = [131, 60, 300, 15, 70] if ragged else [640]
    q_blocks, k_blocks = Blocks.of_runs(runs, 128), Blocks.of_runs(runs[::-1], 128)
    visited = torch.rand(1, HEADS, q_blocks.n, k_blocks.n, generator=generator) < 0.5
    visited[0, 0, 0] = visited[0, 1, 2:4] = False
    visited[0, 1, 1] = torch.arange(k_blocks.n) == k_blocks.n - 1
    visited[0, 2, 0] = True
    orders = torch.stack([torch.randperm(sum(runs), generator=generator) for _ in range(HEADS)])
    index = {"none": None, "shared": orders[0], "head": orders}[order]
    full = box = None
    if boxes is not None:
        full = torch.rand(visited.shape, generator=generator) < 0.5
        full[:, :, 1] = False
        some = Boxes.random((2, 0, 2), boxes, q_blocks.total, k_blocks.total, seed)
        # Boxes at the one side, of one row in 16, are empty.
        nothing = torch.zeros_like(some.text)
        box = replace(some, key=some.key.clamp(max=2), text=nothing).packed()
    plan = BlockPlan.from_mask(
        visited, q_blocks, k_blocks, full=full, box=box,
        order=None if index is None else Permutation(index),
    )  # fmt: skip
    return replace(plan, uneven=uneven)


def modelled(
    monkeypatch: pytest.MonkeyPatch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    lengths: tuple[Tensor, Tensor] | None,
    rings: Any,
    seed: int,
    programs: int,
) -> AttentionOutput:
    """What the launcher asks for, by the model."""
    asked: list[Any] = []
    monkeypatch.setattr(hopper_gluon, "refuses", lambda *_: None)
    monkeypatch.setattr(hopper_gluon, "multiprocessors", lambda _: programs)
    monkeypatch.setattr(hopper_gluon, "launch_specialised", lambda *given, **_: asked.append(given))
    tiles = q.shape[1] * plan.q_blocks.n
    queue = torch.randperm(tiles, dtype=torch.int32)
    monkeypatch.setattr(dealt, "queue_of", lambda *_: queue)
    shape = (*q.shape[:2], q.shape[2])
    result = AttentionOutput(torch.full_like(q, torch.nan), torch.full(shape, torch.nan))
    scale, plan = q.shape[-1] ** -0.5, weighing(plan)
    mask = plan.mask_product
    hopper_gluon.launch(q, k, v, plan, scale, result, mask=mask, lengths=lengths, rings=rings)
    (given,) = asked
    launched(SOURCES, seed, given)
    return result


def lengths_of(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    norms = q.float().norm(dim=-1)
    longest = k.float().norm(dim=-1).amax(-1).repeat_interleave(q.shape[1] // k.shape[1], 1)
    return norms.contiguous(), longest.contiguous()


def tensors(
    n: int, dim: int, kv_heads: int, seed: int, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, n, heads, dim) for heads in (HEADS, kv_heads, kv_heads)]
    q, k, v = (
        torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes
    )
    return q, k, v


RINGS = {
    "as shipped": lambda dim: hopper_gluon.rings_for(dim),
    "one of queries": lambda dim: hopper_gluon.Rings(1, 2, 2),
    "one of queries, three": lambda dim: hopper_gluon.Rings(1, 3, 3),
    "one of queries, more values": lambda dim: hopper_gluon.Rings(1, 2, 3),
    "four": lambda dim: hopper_gluon.Rings(2, 4, 4),
}


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("rings", RINGS)
@pytest.mark.parametrize(
    ("ragged", "order", "uneven", "kv_heads", "dim"),
    [
        (False, "none", False, HEADS, 64),
        (True, "head", False, HEADS, 64),
        (True, "shared", True, HEADS, 128),
        (False, "none", True, 1, 128),
    ],
)
def test_the_source_computes_attention_in_any_order_of_events(
    monkeypatch, bound, rings: str, ragged, order, uneven, kv_heads, dim
):
    plan = plan_of(3, ragged=ragged, order=order, uneven=uneven)
    dtype = torch.bfloat16 if bound else torch.float16
    q, k, v = tensors(plan.q_blocks.total, dim, kv_heads, seed=4, dtype=dtype)
    moved = q, k, v
    if plan.order is not None:
        index = plan.order.index.expand(HEADS, -1)[None, :, :, None].expand_as(q)
        moved = tuple(x.gather(2, index) for x in (q, k, v))
    lengths = lengths_of(*moved[:2]) if bound else None
    for seed in range(3):
        got = modelled(monkeypatch, *moved, plan, lengths, RINGS[rings](dim), seed, programs=4)
        check(got, q, k, v, plan)


def check(
    got: AttentionOutput, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, again: bool = False
) -> None:
    """Args:
    again: rows that see none of their entries are to be computed again.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    exact, lse = masked_attention(q, k, v, plan.to_mask())
    seen = lse > -math.inf
    if again:
        read = hidden_though_read(plan, seen)
        assert bool(read.any())
        lse = lse.masked_fill(read, math.inf)
    torch.testing.assert_close(got.lse.double(), lse, rtol=1e-4, atol=1e-3)
    assert not got.out[~seen].any()
    error = (got.out.double() - exact)[seen].norm() / exact[seen].norm()
    assert float(error) <= (6e-3 if q.dtype == torch.bfloat16 else 2e-3)


def hidden_though_read(plan: BlockPlan, seen: Tensor) -> Tensor:
    """Which rows see nothing, although their block reads some."""
    read = (plan.count > 0)[..., plan.q_blocks.of_token].expand_as(seen)
    if plan.order is not None:
        index = plan.order.index.expand(HEADS, -1)
        read = torch.empty_like(read).scatter(-1, index[None].expand_as(read), read)
    return read & ~seen


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize(
    ("ragged", "order", "uneven", "kv_heads", "dim", "boxes"),
    [
        (False, "none", False, HEADS, 64, 1),
        (True, "head", False, HEADS, 64, HEADS),
        (True, "shared", True, 1, 128, HEADS),
        (True, "none", False, 1, 128, 1),
    ],
)
def test_masks_are_a_product(monkeypatch, bound, ragged, order, uneven, kv_heads, dim, boxes):
    plan = plan_of(3, ragged=ragged, order=order, uneven=uneven, boxes=boxes)
    assert plan.mask_product is not None
    dtype = torch.bfloat16 if bound else torch.float16
    q, k, v = tensors(plan.q_blocks.total, dim, kv_heads, seed=4, dtype=dtype)
    moved = q, k, v
    if plan.order is not None:
        index = plan.order.index.expand(HEADS, -1)[None, :, :, None]
        moved = tuple(x.gather(2, index[:, : x.shape[1]].expand_as(x)) for x in (q, k, v))
    lengths = lengths_of(*moved[:2]) if bound else None
    for seed, rings in enumerate(("as shipped", "one of queries", "four")):
        made = RINGS[rings](dim)
        got = modelled(monkeypatch, *moved, plan, lengths, made, seed, programs=4)
        check(got, q, k, v, plan, again=bound)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("k.permute((1, 0)), scores, use_acc=True", "k.permute((1, 0)), scores, use_acc=False"),
        ("it + 1 < steps, COLUMNS)", "False, COLUMNS)"),
        ("pattern = _loaded(pattern_ptr + first_1 + 1", "_loaded(pattern_ptr + first_1 + 1"),
        ("(kind * 2 + half) * ROWS", "kind * 2 * ROWS"),
        ("kind, pattern = kind_1, pattern_1", "pass"),
        ("steps += gl.load(partial_ptr + row)", "pass"),
        (" * floor", " * -1e30"),
        ("pattern = _loaded(pattern_ptr + first + it", "_loaded(pattern_ptr + first + it"),
    ],
)
def test_what_masks_need_is_seen_to_be_missing(monkeypatch, before: str, after: str):
    plan = plan_of(3, ragged=True, order="none", uneven=False, boxes=HEADS)
    q, k, v = tensors(plan.q_blocks.total, 64, HEADS, seed=4)
    break_once(monkeypatch, before, after)
    got = modelled(monkeypatch, q, k, v, plan, None, hopper_gluon.rings_for(64), 0, 3)
    with pytest.raises(AssertionError):
        check(got, q, k, v, plan)


def marked(plan: BlockPlan, *, bias: bool, words: bool) -> BlockPlan:
    """The plan with random words in place of its box, none of which show a key to one row, and with
    biases: a fourth has none, a row only low ones, and one only -inf; some are so high that they
    leave little of the other entries.
    """
    generator = torch.Generator().manual_seed(plan.indices.numel())
    entries = plan.indices.numel()
    offsets, count = plan.offsets.flatten(), (plan.full + plan.partial).flatten()
    if words:
        given = torch.randint(-(2**31), 2**31, (entries, 4), generator=generator).int()
        given[::5], given[1::5] = 0, -1
        row = int(torch.where(plan.full.flatten() == 0, count, 0).argmax())
        given[offsets[row] : offsets[row] + count[row]] = 0
        plan = replace(plan, box=None, words=given)
    if bias:
        biases = 3 * torch.randn(entries, generator=generator)
        kind = torch.rand(entries, generator=generator)
        for least, value in ((0.75, 0.0), (0.9, -math.inf), (0.95, 40.0), (0.98, -100.0)):
            biases[kind > least] = value
        rows = count.argsort()[-4:].tolist()
        for row, value in ((rows[0], -math.inf), (rows[2], -80.0)):
            biases[offsets[row] : offsets[row] + count[row]] = value
        plan = replace(plan, bias=biases)
    return check_plan(plan)


def check_marked(
    got: AttentionOutput, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, bound: bool
) -> None:
    """Against float64, and under a bound which rows are to be computed again: those that read
    something, and have less than 2^-85 of the weight that it allows."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    exact, lse = attend(q.double(), k.double(), v.double(), plan, backend="reference")
    lse = lse.double()
    seen = lse > -math.inf
    assert bool((~seen).any())
    if bound:
        norms, longest = lengths_of(q, k)
        top = (norms * longest[..., None]).double() * q.shape[-1] ** -0.5
        lists = weighing(plan)
        read = ((lists.full + lists.partial) > 0)[..., plan.q_blocks.of_token].expand_as(seen)
        if plan.bias is not None:
            above = highest(lists)[..., plan.q_blocks.of_token].expand_as(top)
            read, above = (in_the_order_of_the_caller(x, plan) for x in (read, above))
            top = top + above
        else:
            read = in_the_order_of_the_caller(read, plan)
        below = (top - lse) / math.log(2)
        assert not bool(((below - 85).abs() < 0.5).any())
        again = read & (below > 85)
        assert bool(again.any()) or plan.words is None
        assert torch.equal(got.lse == math.inf, again)
        lse, seen = lse.masked_fill(again, math.inf), seen & ~again
    torch.testing.assert_close(got.lse.double(), lse, rtol=1e-4, atol=1e-3)
    assert not got.out[lse == -math.inf].any()
    error = (got.out.double() - exact)[seen].norm() / exact[seen].norm()
    assert float(error) <= (6e-3 if q.dtype == torch.bfloat16 else 2e-3)


def in_the_order_of_the_caller(rows: Tensor, plan: BlockPlan) -> Tensor:
    if plan.order is None:
        return rows
    index = plan.order.index.expand(rows.shape[1], -1)[None].expand_as(rows)
    return torch.empty_like(rows).scatter(-1, index, rows)


def in_plan_order(plan: BlockPlan, *given: Tensor) -> tuple[Tensor, ...]:
    if plan.order is None:
        return given
    index = plan.order.index.expand(HEADS, -1)[None, :, :, None]
    return tuple(x.gather(2, index[:, : x.shape[1]].expand_as(x)) for x in given)


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("kinds", ["bias", "words", "bias words", "bias box"])
@pytest.mark.parametrize(
    ("ragged", "order", "uneven", "kv_heads", "dim"),
    [
        (False, "none", False, HEADS, 64),
        (True, "head", False, HEADS, 128),
        (True, "shared", True, 1, 64),
        (False, "none", True, 1, 128),
    ],
)
def test_biases_and_words(
    monkeypatch, bound: bool, kinds: str, ragged, order, uneven, kv_heads, dim
):
    boxes = None if kinds == "bias" else HEADS
    plan = plan_of(3, ragged=ragged, order=order, uneven=uneven, boxes=boxes)
    plan = marked(plan, bias="bias" in kinds, words="words" in kinds)
    dtype = torch.bfloat16 if bound else torch.float16
    q, k, v = tensors(plan.q_blocks.total, dim, kv_heads, seed=4, dtype=dtype)
    moved = in_plan_order(plan, q, k, v)
    lengths = lengths_of(*moved[:2]) if bound else None
    for seed, rings in enumerate(("as shipped", "one of queries", "four")):
        made = RINGS[rings](dim)
        got = modelled(monkeypatch, *moved, plan, lengths, made, seed, programs=4)
        check_marked(got, q, k, v, plan, bound)


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_where_no_entry_weighs_anything(monkeypatch, bound: bool, ragged: bool):
    plan = plan_of(3, ragged=ragged, order="none", uneven=False, boxes=HEADS)
    plan = replace(plan, bias=torch.full(plan.indices.shape, -math.inf))
    assert weighing(plan).indices.numel() == 0
    q, k, v = tensors(plan.q_blocks.total, 64, HEADS, seed=4)
    lengths = lengths_of(q, k) if bound else None
    got = modelled(monkeypatch, q, k, v, plan, lengths, hopper_gluon.rings_for(64), 1, programs=4)
    assert not got.out.any()
    assert bool((got.lse == -math.inf).all())


@pytest.mark.parametrize(
    ("bound", "before", "after"),
    [
        (True, "    if masked:", "    if False:"),
        (True, "masked = partial & read", "masked = read"),
        (True, "gl.where(key < 32, a, b)", "gl.where(key < 32, b, a)"),
        (True, "gl.where(key < 96, c, d)", "c"),
        (True, "True, it >= full,", "True, it > full,"),
        (True, "first_1, steps_1 > 0, full_1 == 0", "first_1, steps_1 > 0, steps_1 < 0"),
        (True, "first_1, q_start_1, q_end_1, full_1\n", "first_1, q_start_1, q_end_1, full\n"),
        (True, "q_end_1, full_1 = first_2", "q_end_1, _ = first_2"),
        (True, "steps_1, highest_1 = head_2", "steps_1, _ = head_2"),
        (True, "COLUMNS or HAS_WORDS", "COLUMNS"),
        (True, "top -= bias", "pass"),
        (True, "m_i += highest", "pass"),
        (False, "highest += bias", "pass"),
        (False, "if RAGGED or HAS_WORDS:", "if RAGGED:"),
    ],
)
def test_what_biases_and_words_need_is_seen_to_be_missing(
    monkeypatch, bound: bool, before: str, after: str
):
    plan = plan_of(3, ragged=False, order="none", uneven=False, boxes=HEADS)
    plan = replace(marked(plan, bias=True, words=True), lasting=False)  # dealt in turns
    dtype = torch.bfloat16 if bound else torch.float16
    q, k, v = tensors(plan.q_blocks.total, 64, HEADS, seed=4, dtype=dtype)
    break_once(monkeypatch, before, after)
    lengths = lengths_of(q, k) if bound else None
    got = modelled(monkeypatch, q, k, v, plan, lengths, hopper_gluon.rings_for(64), 0, 3)
    with pytest.raises(AssertionError):
        check_marked(got, q, k, v, plan, bound)


def test_a_bound_far_above_all_scores_is_said(monkeypatch):
    plan = plan_of(3, ragged=False, order="none", uneven=False)
    q, k, v = tensors(plan.q_blocks.total, 64, HEADS, seed=4, dtype=torch.bfloat16)
    norms, longest = lengths_of(q, k)
    got = modelled(
        monkeypatch,
        q,
        k,
        v,
        plan,
        (norms, longest * 100),
        hopper_gluon.rings_for(64),
        0,
        programs=3,
    )
    seen = masked_attention(q, k, v, plan.to_mask())[1] > -math.inf
    assert bool((got.lse[seen] == math.inf).all())
    assert bool((got.lse[~seen] == -math.inf).all())


def break_once(monkeypatch: pytest.MonkeyPatch, before: str, after: str) -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in SOURCES}
    assert any(before in text for text in texts.values())

    def read(self: Path, **named: Any) -> str:
        return texts[self].replace(before, after)

    monkeypatch.setattr(Path, "read_text", read)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("mbarrier.wait(k_full.index(k_slot), k_phase)", "pass"),
        ("mbarrier.wait(value_ready, v_phase)", "pass"),
        ("mbarrier.arrive(done.index(k_slot))", "pass"),
        ("mbarrier.wait(done.index(slot), phase ^ 1, pred=pred)", "pass"),
        ("hopper.warpgroup_mma_wait(1, [scores])", "hopper.warpgroup_mma_wait(2, [scores])"),
        (
            "acc, _ = hopper.warpgroup_mma_wait(0, [acc, behind])",
            "acc = hopper.warpgroup_mma_wait(0, [acc])",
        ),
        ("_wait_done(done, slot, phase, SLOTS - 2, SLOTS, pred=crowded)", "pass"),
    ],
)
def test_the_model_sees_what_is_missing(monkeypatch, before: str, after: str):
    """Of every kind of wait one, in some order of events."""
    plan = plan_of(3, ragged=False, order="none", uneven=False)
    q, k, v = tensors(plan.q_blocks.total, 64, HEADS, seed=4, dtype=torch.bfloat16)
    break_once(monkeypatch, before, after)

    def once(seed: int) -> None:
        rings, lengths = hopper_gluon.Rings(1, 2, 2), lengths_of(q, k)
        check(modelled(monkeypatch, q, k, v, plan, lengths, rings, seed, 2), q, k, v, plan)

    def some() -> None:
        for seed in range(8):
            once(seed)

    with pytest.raises((AssertionError, RuntimeError)):
        some()


def test_what_it_refuses(monkeypatch):
    monkeypatch.setattr(hopper_gluon.triton, "__version__", "3.6.0")
    monkeypatch.setattr(hopper_gluon.triton.knobs.runtime, "interpret", False)
    plan = plan_of(0, ragged=False, order="none", uneven=False)
    assert hopper_gluon.refuses(plan, 0.125) is None
    for bias, sentence in (
        (4096.0, None),
        (-4097.0, "got one 4097 from 0"),
        (-math.inf, "got one inf from 0"),
    ):
        biases = torch.zeros(plan.indices.numel())
        biases[3] = bias
        reason = hopper_gluon.refuses(replace(plan, bias=biases), 0.125)
        assert reason is None if sentence is None else sentence in reason
    assert "positive scale, got 0.0" in hopper_gluon.refuses(plan, 0.0)
    small = Blocks.uniform(640, 64, "cpu")
    visited = torch.ones(1, 1, small.n, small.n, dtype=torch.bool)
    assert "blocks of 128" in hopper_gluon.refuses(BlockPlan.from_mask(visited, small, small), 0.1)
    monkeypatch.setattr(hopper_gluon.triton, "__version__", "3.9.0")
    assert "expected Triton 3.6" in hopper_gluon.refuses(plan, 0.1)
    q, k, v = tensors(640, 64, HEADS, seed=0)
    result = AttentionOutput(torch.empty_like(q), torch.empty(q.shape[:3]))
    assert hopper_gluon.launch(q, k, v, plan, 0.1, result) is None
    monkeypatch.setattr(hopper_gluon.triton, "__version__", "3.6.0")
    monkeypatch.setattr(hopper_gluon.triton.knobs.runtime, "interpret", True)
    assert "interpreter" in hopper_gluon.refuses(plan, 0.1)
    monkeypatch.setattr(hopper_gluon, "_block_sparse_fwd_hopper_gluon", None)
    assert "with Gluon" in hopper_gluon.refuses(plan, 0.1)


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("picture", [range(1, 8), range(6), range(2, 5)])
@pytest.mark.parametrize(("programs", "boxes"), [(1, None), (2, HEADS), (5, None)])
def test_text_is_dealt_among_the_programs(
    monkeypatch, uneven, picture: range, programs: int, boxes: int | None
):
    plan = plan_of(5, ragged=True, order="none", uneven=uneven, boxes=boxes)
    assert plan.q_blocks.n == 8
    plan = replace(plan, q_blocks=replace(plan.q_blocks, picture=picture))
    q, k, v = tensors(plan.q_blocks.total, 64, HEADS, seed=2)
    rings, lengths = hopper_gluon.rings_for(64), lengths_of(q, k)
    got = modelled(monkeypatch, q, k, v, plan, lengths, rings, programs, programs)
    check(got, q, k, v, plan, again=boxes is not None)


@pytest.mark.parametrize("sizes", [(3, 2, 2), (2, 1, 1), (2, 3, 2), (2, 2, 4)])
def test_rings_that_would_wait_for_themselves_are_refused(sizes):
    with pytest.raises(ValueError, match="wait for themselves"):
        hopper_gluon.Rings(*sizes)


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
GPU = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")


def on_gpu(monkeypatch: pytest.MonkeyPatch, plan: BlockPlan, bound: bool) -> tuple[Any, list[Any]]:
    """A backend that runs it, and what its launches were."""
    made: list[Any] = []
    real = hopper_gluon.launch

    def launch(*given: Any, **named: Any) -> Any:
        made.append(real(*given, **named))
        return made[-1]

    if hopper_gluon.refuses(plan, 1.0) is not None:
        pytest.skip(str(hopper_gluon.refuses(plan, 1.0)))
    monkeypatch.setattr(hopper_gluon, "launch", launch)
    return TritonBackend(kernel="hopper_gluon", bound=bound), made


def check_on_gpu(
    monkeypatch: pytest.MonkeyPatch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    launched: BlockPlan,
    bound: bool,
) -> None:
    """Against the reference in float64, and equal from call to call.

    Args:
        launched: what the kernel gets of the plan.
    """
    monkeypatch.setattr(hopper_gluon, "multiprocessors", lambda _: 11)  # several turns of each
    backend, launches = on_gpu(monkeypatch, launched, bound)
    first = attend(q, k, v, plan, backend=backend)
    assert launches
    assert None not in launches
    exact = attend(q.double(), k.double(), v.double(), plan, backend="reference")
    seen = exact.lse > -math.inf
    assert float((first.out - exact.out)[seen].norm() / exact.out[seen].norm()) <= 1e-2
    torch.testing.assert_close(first.lse.double(), exact.lse.double(), rtol=1e-6, atol=1e-3)
    assert not first.out[~seen].any()
    check_repeats(lambda: attend(q, k, v, plan, backend=backend), first)


def check_repeats(run: Callable[[], AttentionOutput], first: AttentionOutput) -> None:
    """A hundred more calls are equal bit for bit."""
    for _ in range(100):
        again = run()
        assert torch.equal(again.out, first.out)
        assert torch.equal(again.lse, first.lse)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@GPU
@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize(
    ("ragged", "order", "dim", "dtype"),
    [
        (False, "none", 64, torch.bfloat16),
        (False, "head", 128, torch.bfloat16),
        (True, "none", 128, torch.bfloat16),
        (True, "head", 64, torch.bfloat16),
        (True, "shared", 96, torch.bfloat16),
        (False, "none", 128, torch.float16),
        (True, "head", 64, torch.float16),
    ],
)
def test_on_a_gpu(monkeypatch, bound: bool, uneven: bool, ragged, order, dim, dtype):
    heads, tokens = 20, 2304 - 5 * ragged  # some three tiles for each multiprocessor
    generator = torch.Generator().manual_seed(dim)
    runs = [131, 1, 71, 63, tokens - 266] if ragged else [tokens]
    q_blocks, k_blocks = Blocks.of_runs(runs, 128), Blocks.of_runs(runs[::-1], 128)
    visited = torch.rand(1, heads, q_blocks.n, k_blocks.n, generator=generator) < 0.3
    visited[0, 0, 0] = visited[0, 3, 2:5] = False
    visited[0, 5] = torch.eye(q_blocks.n, k_blocks.n, dtype=torch.bool)
    visited[0, ::4, 1] = True
    orders = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(heads)])
    index = {"none": None, "shared": orders[0], "head": orders}[order]
    moved = None if index is None else Permutation(index)
    plan = BlockPlan.from_mask(visited, q_blocks, k_blocks, order=moved)
    plan = replace(plan, uneven=uneven).to("cuda")
    shape = (1, tokens, heads, dim)
    made = (torch.randn(shape, generator=generator).to("cuda", dtype) for _ in range(3))
    q, k, v = (x.transpose(1, 2) for x in made)
    backend, launches = on_gpu(monkeypatch, plan, bound)
    first = attend(q, k, v, plan, backend=backend)
    assert launches
    assert None not in launches
    shown = plan.to_mask()
    for head in range(heads):  # all at once would take gigabytes
        exact, lse = masked_attention(*(x[0, head] for x in (q, k, v)), shown[0, head])
        out, seen = first.out[0, head], lse > -math.inf
        assert float((out.double() - exact)[seen].norm() / exact[seen].norm()) <= 1e-2
        torch.testing.assert_close(first.lse[0, head].double(), lse, rtol=1e-6, atol=1e-3)
        assert not out[~seen].any()
    check_repeats(lambda: attend(q, k, v, plan, backend=backend), first)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@GPU
@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize(
    ("boxes", "picture", "kv_heads", "dim", "uneven"),
    [
        (1, range(18), HEADS, 128, False),
        (HEADS, range(1, 18), 1, 64, False),
        (HEADS, range(2, 15), HEADS, 128, True),
        (None, range(3, 18), 1, 128, False),
        (None, range(16), HEADS, 64, True),
    ],
)
def test_masks_and_text_on_a_gpu(monkeypatch, bound, boxes, picture, kv_heads, dim, uneven):
    generator = torch.Generator().manual_seed(dim)
    blocks = Blocks.uniform(2299, 128)  # the last one is short
    assert blocks.n == 18
    visited = torch.rand(1, HEADS, blocks.n, blocks.n, generator=generator) < 0.3
    visited[:, :, : picture.start] = visited[:, :, picture.stop :] = True
    visited[0, 0, 7] = False
    full = box = None
    if boxes is not None:
        full = torch.rand(visited.shape, generator=generator) < 0.5
        full[:, :, 5] = False
        box = Boxes.random((2, 0, 2), boxes, 2299, 2299, dim).packed()
    beside_text = replace(blocks, picture=picture)
    plan = BlockPlan.from_mask(visited, beside_text, blocks, full=full, box=box)
    plan = replace(plan, uneven=uneven).to("cuda")
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(2299, dim, kv_heads, seed=dim))
    check_on_gpu(monkeypatch, q, k, v, plan, plan, bound)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@GPU
@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("kinds", ["bias", "words", "bias words", "bias box"])
@pytest.mark.parametrize(
    ("tokens", "kv_heads", "dim", "uneven"),
    [
        (2299, HEADS, 128, False),
        (2304, 1, 64, True),
        (2304, HEADS, 128, True),
        (2299, 1, 64, False),
    ],
)
def test_biases_and_words_on_a_gpu(monkeypatch, bound, kinds, tokens, kv_heads, dim, uneven):
    generator = torch.Generator().manual_seed(dim)
    blocks = Blocks.uniform(tokens, 128)
    visited = torch.rand(1, HEADS, blocks.n, blocks.n, generator=generator) < 0.3
    visited[0, 0, 7] = False
    full = box = None
    if kinds != "bias":
        full = torch.rand(visited.shape, generator=generator) < 0.5
        full[:, :, 5] = False
        box = Boxes.random((2, 0, 2), HEADS, tokens, tokens, dim).packed()
    plan = BlockPlan.from_mask(visited, blocks, blocks, full=full, box=box)
    plan = marked(plan, bias="bias" in kinds, words="words" in kinds)
    plan = replace(plan, uneven=uneven).to("cuda")
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(tokens, dim, kv_heads, seed=dim))
    check_on_gpu(monkeypatch, q, k, v, plan, weighing(plan), bound)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@GPU
@pytest.mark.parametrize("dim", [64, 128])
def test_long_sequences_on_a_gpu_are_equal_bit_for_bit(monkeypatch, dim: int):
    blocks = Blocks.uniform(16_896, 128, "cuda")
    visited = torch.rand(1, 24, blocks.n, blocks.n, device="cuda") < 0.2
    plan = BlockPlan.from_mask(visited, blocks, blocks)
    shape = (1, 24, 16_896, dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    backend, launches = on_gpu(monkeypatch, plan, bound=True)
    first = attend(q, k, v, plan, backend=backend)
    assert launches
    assert launches[0] is not None
    stock = attend(q, k, v, plan, backend=TritonBackend(kernel="hopper")).out
    assert float((first.out.float() - stock.float()).norm() / stock.float().norm()) <= 6e-3
    check_repeats(lambda: attend(q, k, v, plan, backend=backend), first)
