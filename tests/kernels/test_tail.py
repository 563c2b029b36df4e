"""Tails and pooled rows in the specialised kernels, in Triton's interpreter, against the reference
in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.attention import attend
from dit_sparse.backend import AttentionOutput
from dit_sparse.kernels.variants import Kernel
from dit_sparse.plan import BlockPlan, Blocks, Pools
from dit_sparse.plan_check import check
from tests.block_cases import HEADS, Case, covering, plan_of, tensors_of
from tests.gluon_model import launched
from tests.problems import pooled

tail = pytest.importorskip("dit_sparse.kernels.tail")
pooled_rows = pytest.importorskip("dit_sparse.kernels.pooled")
norms = pytest.importorskip("dit_sparse.kernels.norms")
rooms = pytest.importorskip("dit_sparse.kernels.rooms")
pool = pytest.importorskip("dit_sparse.kernels.pool")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter"),
    pytest.mark.usefixtures("poisoned"),
]

COMMON = {
    "head_dim": [64, 72],
    "ragged": [True, False],
    "order": ["none", "shared", "head"],
    "lists": ["shared", "head", "batch"],
    "hidden": [True, False],
}
TAILS = covering({**COMMON, "bounded": [True, False], "tail": ["zeroth", "first"]}, strength=2)
LEVELS = [(2, 4, 8), (4,), (2, 128), (8, 16)]
KERNELS = ["hopper", "hopper_gluon"] if pooled_rows._pooled_fwd_hopper_gluon else ["hopper"]
IN_GLUON = pytest.mark.skipif(len(KERNELS) < 2, reason="needs a Triton with Gluon")
CHOSEN = {"bounded": [True, False], "factors": LEVELS, "kernel": KERNELS}
POOLS = covering({**COMMON, **CHOSEN}, strength=2)
HERE = Path(pooled_rows.__file__)
NAMES = [*(f"_gluon_{name}.py" for name in ("fetch", "rows", "weights")), "_hopper_gluon.py"]
NAMES += [f"_gluon_{name}.py" for name in ("tiles", "pooled")]
SOURCES = [HERE.with_name(name) for name in NAMES]


def name(values: dict) -> str:
    return "-".join(map(str, values.values()))


def case_of(values: dict) -> Case:
    given = {name: values[name] for name in ("head_dim", "ragged", "order", "lists")}
    return Case(q_block=128, k_block=128, dtype=torch.float16, box=False, **given)


def hidden_of(plan: BlockPlan) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(2, plan.k_blocks.n, generator=generator) < 0.3


def without_hidden(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """What padding holds is nobody's concern, but for tiles of short blocks that reach into it."""
    if plan.hidden is None or plan.k_blocks.ragged:
        return q, k, v
    unseen = plan.hidden[:, plan.k_blocks.of_token][:, None, :, None].expand(*k.shape[:3], 1)
    unseen = unseen if plan.order is None else plan.order.undo(unseen)
    return q, k.masked_fill(unseen, float("nan")), v.masked_fill(unseen, float("nan"))


def compare(
    got: AttentionOutput,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float | None = None,
) -> None:
    given = (x.double() for x in (q, k, v))
    out, lse = attend(*given, plan, scale=scale, backend="reference")
    assert float((got.out.double() - out).norm()) <= 4e-3 * float(out.norm())
    torch.testing.assert_close(got.out.double(), out, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(got.lse, lse, rtol=4e-3, atol=4e-3)
    assert not got.out[lse == -torch.inf].any()


def with_tail(values: dict) -> BlockPlan:
    plan = plan_of(case_of(values))
    if values["hidden"]:
        hidden = hidden_of(plan)
        shown = plan.visited & ~hidden[:, None, None]
        lists = BlockPlan.from_mask(shown, plan.q_blocks, plan.k_blocks, order=plan.order)
        plan = replace(lists, hidden=hidden)
    return check(replace(plan, tail=values["tail"]))


def added(room: Any, plan: BlockPlan, scale: float, exact: BlockPlan) -> AttentionOutput:
    """What the kernel makes of the result for the exact entries."""
    result = AttentionOutput(
        *attend(room.q, room.k, room.v, exact, scale=scale, backend="reference")
    )
    slope, (q, k, v) = None, room.ordered
    if room.centres is not None:
        slope = pool.slope(k, v, plan.k_blocks, room.centres, plan.hidden)
    assert tail.launch(q, room.means, plan, scale, result, slope)
    return result


@pytest.mark.parametrize("values", TAILS, ids=name)
def test_a_tail_of_means(values: dict):
    plan = with_tail(values)
    q, k, v = without_hidden(*(x.contiguous() for x in tensors_of(case_of(values), plan)), plan)
    assert tail.runs(q, k, v, plan)
    room, launches = rooms.in_order(
        q, k, v, plan, queries=True, bounded=values["bounded"], means=True
    )
    assert len(launches) == 1  # order, means and lengths in one pass
    assert (room.moved is None) == (plan.order is None)  # what is in order is not copied
    assert (room.centres is None) == (plan.tail == "zeroth")
    exact = replace(plan, tail="none")
    compare(added(room, plan, q.shape[-1] ** -0.5, exact), q, k, v, plan)


def test_rows_that_no_descriptor_addresses():
    """66 numbers of 16 bits are no multiple of 16 bytes: another kernel takes them."""
    values = {"head_dim": 66, "ragged": False, "order": "none", "lists": "head", "hidden": False}
    plan = with_tail({**values, "bounded": False, "tail": "zeroth"})
    given = tensors_of(case_of(values), plan)
    assert not tail.runs(*given, plan)
    plan = replace(plan, tail="none", pools=Pools((4,), plan.full[..., None]))
    wide = [torch.nn.functional.pad(x, (0, 6))[..., :66] for x in given]
    result = AttentionOutput(*(torch.empty(0) for _ in range(2)))
    assert not pooled_rows.launch(*wide, plan, 1.0, result)


@pytest.mark.parametrize("visited", [True, False])
def test_a_tail_with_a_slope_that_stands_for_nothing_or_for_everything(visited: bool):
    """A share of 0 divides nothing away, and one of 1 needs no result so far."""
    case = Case(64, 128, 128, dtype=torch.float16, box=False, ragged=True)
    plan, scale = plan_of(case), 0.1
    seen = torch.full((1, 1, plan.q_blocks.n, plan.k_blocks.n), visited)
    plan = BlockPlan.from_mask(seen, plan.q_blocks, plan.k_blocks)
    q, k, v = (x.contiguous() for x in tensors_of(case, plan))
    plan = check(replace(plan, tail="first"))
    room, _ = rooms.in_order(q, k, v, plan, queries=True, bounded=False, means=True)
    got = added(room, plan, scale, replace(plan, tail="none"))
    out, lse = attend(*(x.double() for x in (q, k, v)), plan, scale=scale, backend="reference")
    torch.testing.assert_close(got.out.double(), out, rtol=1e-2, atol=4e-3)
    torch.testing.assert_close(got.lse, lse, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("values", POOLS, ids=name)
def test_pooled_rows_in_tiles(values: dict):
    generator = torch.Generator().manual_seed(3)
    plan = plan_of(case_of(values))
    hidden = hidden_of(plan)[: plan.offsets.shape[0]] if values["hidden"] else None
    plan = check(pooled(plan, values["factors"], hidden, generator))
    q, k, v = without_hidden(*(x.contiguous() for x in tensors_of(case_of(values), plan)), plan)
    # The weights of a bound far above the scores need the exponents of bfloat16.
    scale = q.shape[-1] ** -0.5 * (0.25 if values["bounded"] else 1.0)
    chosen = {name: values[name] for name in ("bounded", "kernel")}
    result = with_pools(q, k, v, plan, scale, **chosen)
    compare(result, q, k, v, plan, scale)


@IN_GLUON
@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("ragged", [True, False])
def test_pooled_rows_in_any_order_of_events(ragged: bool, bounded: bool):
    plan, (q, k, v) = small(ragged)
    scale = 0.04 if bounded else 0.125
    for seed in range(3):
        result = with_pools(q, k, v, plan, scale, bounded=bounded, kernel="hopper_gluon", seed=seed)
        compare(result, q, k, v, plan, scale)


@IN_GLUON
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("mbarrier.wait(k_full.index(k_slot), k_phase)", "pass"),
        ("into.slice(n * KEYS, KEYS)", "into.slice(0, KEYS)"),
        ("mbarrier.arrive(done.index(k_slot))", "pass"),
        ("_entries(listed, step, whole, count, TILES)", "_entries(listed, 0, whole, count, TILES)"),
        ("entries = _entries(listed_1, 0, whole_1, count_1, TILES)", "pass"),
        ("gl.where(behind, whole, 0)", "0"),
        ("gl.where(at + n <= last, -1, -256)", "-1"),
        ("p *= gl.expand_dims(share, 0)", "pass"),
        ("before, v_row = entries, k_row", "before = entries"),
        ("            before = entries\n", ""),
        ("m_i, l_i = m_1, l_1", "l_i = l_1"),
    ],
)  # fmt: skip
def test_what_pooled_rows_need_is_seen_to_be_missing(
    monkeypatch: pytest.MonkeyPatch, before: str, after: str
):
    plan, (q, k, v) = small()
    texts = {path: path.read_text(encoding="utf-8") for path in SOURCES}
    assert any(before in text for text in texts.values())
    monkeypatch.setattr(Path, "read_text", lambda self, **_: texts[self].replace(before, after))

    def some() -> None:
        for seed in range(4):
            result = with_pools(
                q, k, v, plan, 0.125, bounded=False, kernel="hopper_gluon", seed=seed
            )
            compare(result, q, k, v, plan, 0.125)

    with pytest.raises((AssertionError, RuntimeError)):
        some()


@IN_GLUON
def test_what_was_refused_once_is_not_pooled_for_again(monkeypatch: pytest.MonkeyPatch):
    plan, (q, k, v) = small()
    made: list[int] = []
    real, launch = pooled_rows.pool_all, pooled_rows.launch_specialised

    def pool(*given: Any, least: int, **named: Any) -> Any:
        made.append(least)
        return real(*given, least=least, **named)

    def refuse(*given: Any, **named: Any) -> Any:
        gluon = given[0] is pooled_rows._pooled_fwd_hopper_gluon
        return None if gluon else launch(*given, **named)

    monkeypatch.setattr(pooled_rows, "_refused", set())
    monkeypatch.setattr(pooled_rows, "pool_all", pool)
    monkeypatch.setattr(pooled_rows, "launch_specialised", refuse)
    monkeypatch.setattr(pooled_rows.hopper_gluon, "unavailable", lambda: None)
    monkeypatch.setattr(pooled_rows.hopper_gluon, "multiprocessors", lambda _: 4)
    exact = attend(q, k, v, replace(plan, pools=None), scale=0.125, backend="reference")
    for _ in range(2):
        result = AttentionOutput(*(x.clone() for x in exact))
        assert pooled_rows.launch(q, k, v, plan, 0.125, result, kernel="hopper_gluon")
        compare(result, q, k, v, plan, 0.125)
    assert made == [pooled_rows.ROWS_IN_GLUON, pooled_rows.ROWS, pooled_rows.ROWS]


def long_lists(dim: int) -> tuple[BlockPlan, tuple[Tensor, Tensor, Tensor]]:
    """Two query blocks that read seven steps: blocks pooled by 2, the last of which is short."""
    queries, keys = Blocks.uniform(200, 128), Blocks.uniform(128 * 12 + 40, 128)
    plan = BlockPlan.from_mask(torch.ones(1, 1, 2, keys.n, dtype=torch.bool), queries, keys)
    counts = plan.full[..., None] - 1  # block 0 is exact
    plan = check(replace(plan, full=plan.full - counts[..., 0], pools=Pools((2,), counts)))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, HEADS, n, dim, generator=generator).half()
        for n in (queries.total, keys.total, keys.total)
    )
    return plan, (q, k, v)


@IN_GLUON
@pytest.mark.parametrize(
    ("dim", "before", "after"),
    [
        (64, "", ""),
        (72, "", ""),
        # At head dim 64 there are as many slots of values as of keys, and either wait is enough.
        (72, "_wait_done(done, slot, phase, 0, SLOTS)\n            _fetch(k_desc", "_fetch(k_desc"),
        (72, "_wait_done(done, slot, phase, SLOTS - 2, SLOTS, pred=crowded)", "pass"),
        (64, "_wait_done(done, slot, phase, SLOTS - 2, SLOTS, pred=crowded)", "pass"),
        (64, "if V_SLOTS == SLOTS:\n                _wait", "if False:\n                _wait"),
    ],
)  # fmt: skip
def test_what_fetches_pooled_rows_waits_for_room(
    monkeypatch: pytest.MonkeyPatch, dim: int, before: str, after: str
):
    short = "crowded" in before and dim == 64  # there is room for two query blocks then
    plan, (q, k, v) = small() if short else long_lists(dim)
    texts = {path: path.read_text(encoding="utf-8") for path in SOURCES}
    assert any(before in text for text in texts.values())
    if before:
        texts = {path: text.replace(before, after) for path, text in texts.items()}
    monkeypatch.setattr(Path, "read_text", lambda self, **_: texts[self])

    def some() -> None:
        for seed in range(3):
            result = with_pools(
                q, k, v, plan, 0.125, bounded=False, kernel="hopper_gluon", seed=seed, hasty=2
            )
            compare(result, q, k, v, plan, 0.125)

    if not before:
        some()
        return
    with pytest.raises((AssertionError, RuntimeError)):
        some()


def with_pools(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    *,
    bounded: bool,
    longer: float = 1.0,
    kernel: Kernel = "hopper",
    seed: int = 0,
    hasty: int | None = None,
) -> AttentionOutput:
    """What the kernels make of the result for the exact entries.

    Args:
        longer: makes bounds so many times larger.
        seed, hasty: of the model of a kernel in Gluon.
    """
    exact = replace(plan, pools=None)
    result = AttentionOutput(*attend(q, k, v, exact, scale=scale, backend="reference"))
    q, k, v = (q, k, v) if plan.order is None else (plan.order(x) for x in (q, k, v))
    lengths = None
    if bounded:
        lengths = norms.empty(q)
        norms.measure(q, k, lengths)
        lengths[1].mul_(longer)
    with pytest.MonkeyPatch.context() as patch:
        if kernel == "hopper_gluon":
            in_the_model(patch, seed, hasty)
        assert pooled_rows.launch(q, k, v, plan, scale, result, lengths, kernel=kernel)
    return result


def in_the_model(patch: pytest.MonkeyPatch, seed: int, hasty: int | None) -> None:
    """Runs the kernel in Gluon by the model, and refuses the one in Triton."""

    def launch(*given: Any, **_: Any) -> object | None:
        if given[0] is not pooled_rows._pooled_fwd_hopper_gluon:
            return None
        launched(SOURCES, seed, given, hasty)
        return given

    patch.setattr(pooled_rows.hopper_gluon, "unavailable", lambda: None)
    patch.setattr(pooled_rows.hopper_gluon, "multiprocessors", lambda _: 4)
    patch.setattr(pooled_rows, "launch_specialised", launch)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return request.param


def small(ragged: bool = True) -> tuple[BlockPlan, tuple[Tensor, Tensor, Tensor]]:
    """A plan of several levels, rows without pooled entries and one without any."""
    case = Case(64, 128, 128, dtype=torch.float16, box=False, ragged=ragged, tokens=900)
    plan = check(pooled(plan_of(case), (2, 4, 8), None, torch.Generator().manual_seed(5)))
    assert plan.pools is not None
    listed = plan.pools.counts.sum(-1)
    assert bool((listed == 0).any())
    assert int(listed.max()) >= 3
    return plan, tuple(x.contiguous() for x in tensors_of(case, plan))


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("bounded", [True, False])
def test_pooled_rows_that_are_all_alike(ragged: bool, bounded: bool, kernel: Kernel):
    plan, (q, k, v) = small(ragged)
    k = k[:, :, :1].expand_as(k).contiguous()
    result = with_pools(q, k, v, plan, 0.02, bounded=bounded, kernel=kernel)
    compare(result, q, k, v, plan, 0.02)


@pytest.mark.parametrize("bounded", [True, False])
def test_a_late_tile_far_above_all_others(bounded: bool, kernel: Kernel):
    plan, (q, k, v) = small()
    start, stop = plan.k_blocks.starts[[-2, -1]].tolist()
    q[..., 0], k[..., 0] = 30.0, 0.0
    k[:, :, start:stop] = 0.0
    k[:, :, start:stop, 0] = 30.0  # 112 above, where exp(-104) is 0
    result = with_pools(q, k, v, plan, 0.125, bounded=bounded, kernel=kernel)
    compare(result, q, k, v, plan, 0.125)


def test_pooled_rows_far_below_their_bound(monkeypatch: pytest.MonkeyPatch, kernel: Kernel):
    """Nothing is left of their weights: they are computed again, and only they."""
    plan, (q, k, v) = small()
    assert plan.pools is not None
    result = with_pools(q, k, v, plan, 0.1, bounded=True, longer=400.0, kernel=kernel)
    compare(result, q, k, v, plan, 0.1)
    monkeypatch.setattr(pooled_rows, "_launch_again", lambda *_: None)
    left = with_pools(q, k, v, plan, 0.1, bounded=True, longer=400.0, kernel=kernel)
    exact, _ = attend(q, k, v, replace(plan, pools=None), scale=0.1, backend="reference")
    torch.testing.assert_close(left.out, exact)  # as they were, rows without pooled entries too
    assert not torch.equal(left.out, result.out)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("longer", [1.0, 400.0])
def test_every_row_is_marked_or_not(monkeypatch: pytest.MonkeyPatch, longer: float, kernel: Kernel):
    """Blocks without pooled entries too, which are looked at together with others."""
    plan, (q, k, v) = small()
    assert plan.pools is not None
    seen: list[Tensor] = []
    monkeypatch.setattr(pooled_rows, "_launch_again", lambda *given: seen.append(given[-1]))
    with_pools(q, k, v, plan, 0.1, bounded=True, longer=longer, kernel=kernel)
    (marks,) = seen
    listed = plan.pools.counts.sum(-1).repeat_interleave(plan.q_blocks.lengths, -1) > 0
    assert set(marks.flatten().tolist()) <= {0, 1}
    assert not marks[~listed.expand_as(marks)].any()
    assert bool(marks.any()) == (longer > 1)


def test_rows_with_enough_before_need_no_pooled_ones(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel
):
    """Pooled scores that are too small for numbers, beside exact ones near the bound."""
    monkeypatch.setattr(pooled_rows, "_launch_again", lambda *_: None)
    case = Case(64, 128, 128, dtype=torch.float16, box=False, ragged=False, tokens=512)
    q, k, v = (x.contiguous() for x in tensors_of(case, plan_of(case)))
    seen = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    plan = BlockPlan.from_mask(seen, plan_of(case).q_blocks, plan_of(case).k_blocks)
    counts = torch.full((1, 1, 4, 1), 3, dtype=torch.int32)  # block 0 is exact
    plan = check(replace(plan, full=plan.full - 3, pools=Pools((4,), counts)))
    q[..., 1:], k[..., 1:] = 0.0, 0.0
    q[..., 0] = 10.0
    k[..., 0] = -10.0
    k[:, :, :128, 0] = 10.0
    compare(with_pools(q, k, v, plan, 1.0, bounded=True, kernel=kernel), q, k, v, plan, 1.0)


@pytest.mark.parametrize("bounded", [True, False])
def test_rows_that_hold_no_number(bounded: bool, kernel: Kernel):
    plan, (q, k, v) = small()
    q[0, 1, 5] = float("nan")
    result = with_pools(q, k, v, plan, 0.05, bounded=bounded, kernel=kernel)
    out, lse = attend(*(x.double() for x in (q, k, v)), plan, scale=0.05, backend="reference")
    torch.testing.assert_close(result.out.double(), out, rtol=2e-2, atol=2e-2, equal_nan=True)
    torch.testing.assert_close(result.lse, lse, rtol=4e-3, atol=4e-3, equal_nan=True)


@pytest.mark.parametrize("rows", [pooled_rows.ROWS, pooled_rows.ROWS_IN_GLUON])
@pytest.mark.parametrize("ragged", [True, False])
def test_tiles_of_all_levels(ragged: bool, rows: int):
    """128 keys are, for the factors 2, 4, 8, 2, 1 and, each row of it twice, 1 tile of 32 rows;
    4, 2 and 1 of 16."""
    generator = torch.Generator().manual_seed(0)
    plan = plan_of(Case(64, 128, 128, box=False, ragged=ragged))
    plan = pooled(plan, (2, 4, 8), None, generator)
    assert plan.pools is not None
    lists = pooled_rows.lists_of(plan, plan.pools, rows)
    n, lengths = plan.k_blocks.n, plan.k_blocks.lengths.tolist()
    flat = zip(
        plan.offsets.flatten().tolist(),
        (plan.full + plan.partial).flatten().tolist(),
        plan.pools.counts.reshape(-1, 3).tolist(),
        lists.counts.flatten().tolist(),
        strict=True,
    )
    assert lists.counts.shape[1] == HEADS
    wholes: list[int] = []

    for first, exact, (halves, quarters, eighths), count in flat:
        entries = plan.indices[first + exact :].tolist()
        found, base, nth = [], 0, 0
        for s, of_level in ((1, halves), (2, quarters), (3, eighths)):
            parts = max(1, (128 >> s) // rows)  # tiles of a block
            room = 128 // parts
            found += [
                (base + parts * j + part, s, lengths[j] - room * part, room)
                for j in entries[nth:][:of_level]
                for part in range(parts)
            ]
            base, nth = base + parts * n, nth + of_level
        expected = [number << 11 | s << 8 | room for number, s, left, room in found if left >= room]
        wholes.append(len(expected))
        short = [tile for tile in found if 0 < tile[2] < tile[3]]
        expected += [number << 11 | s << 8 | left for number, s, left, _ in short]
        assert count == len(expected)
        start = first * lists.per_entry
        assert lists.tiles[start : start + count].tolist() == expected
    assert lists.wholes.flatten().tolist() == wholes
    assert (wholes == lists.counts.flatten().tolist()) == (not ragged)
