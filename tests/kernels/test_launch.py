"""Repeated launches: the arguments of a fresh one, other tensors in their places."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.attention import attend, kind, prepare
from dit_sparse.backend import AttentionOutput, PreparingBackend
from dit_sparse.grid import Permutation, TokenGrid, TokenLayout
from dit_sparse.method import CallContext
from dit_sparse.methods.window import WindowMethod
from dit_sparse.plan import BlockPlan
from dit_sparse.plan_cache import PlannedCall

OutOfResources = pytest.importorskip("triton.runtime.errors").OutOfResources
block_sparse = pytest.importorskip("dit_sparse.kernels.block_sparse")
rooms = pytest.importorskip("dit_sparse.kernels.rooms")
hopper = pytest.importorskip("dit_sparse.kernels.hopper")
norms = pytest.importorskip("dit_sparse.kernels.norms")
permute = pytest.importorskip("dit_sparse.kernels.permute")
portable = pytest.importorskip("dit_sparse.kernels.portable")
launch = pytest.importorskip("dit_sparse.kernels.launch")
quantise = pytest.importorskip("dit_sparse.kernels.quantise")
quantised = pytest.importorskip("dit_sparse.kernels.quantised")
tail = pytest.importorskip("dit_sparse.kernels.tail")

Descriptor = launch.TensorDescriptor
pytestmark = pytest.mark.skipif(Descriptor is None, reason="needs tensor descriptors")

LAYOUT = TokenLayout.of(TokenGrid(2, 16, 16), text_last=40)


@dataclass(frozen=True)
class Compiled:
    """Stands for a compiled kernel: notes grid and arguments."""

    seen: list[tuple[Any, ...]]

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        x, y, z = grid  # a compiled kernel, unlike a function, wants all three
        return lambda *arguments: self.seen.append(((x, y, z), *arguments))


@dataclass(frozen=True, eq=False)
class Jit:
    """Stands for a Triton function: binds as Triton does and launches."""

    real: Any
    seen: list[tuple[Any, ...]] = field(default_factory=list)
    examined: list[int] = field(default_factory=list)

    @property
    def arg_names(self) -> list[str]:
        return list(self.real.arg_names)

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Compiled]:
        def run(
            *arguments: Any, num_warps: int, num_stages: int, maxnreg: int = 0, **constants: Any
        ) -> Compiled:
            self.examined.append(len(arguments))
            names = self.arg_names[len(arguments) :]
            assert set(names) == set(constants)
            Compiled(self.seen)[grid](*arguments, *(constants[name] for name in names))
            return Compiled(self.seen)

        return run


@pytest.fixture
def jit(monkeypatch: Any) -> Jit:
    """In the place of both kernels."""
    real = Jit(portable._portable_fwd)
    monkeypatch.setattr(portable, "_portable_fwd", real)
    specialised = Jit(hopper._block_sparse_fwd_hopper, real.seen, real.examined)
    monkeypatch.setattr(hopper, "_block_sparse_fwd_hopper", specialised)
    return real


def plan(window: tuple[int, int, int] = (1, 7, 9), *, ordered: bool = False) -> BlockPlan:
    q = torch.empty(1, 1, 1, 1)
    made = WindowMethod(window=window, tile=(1, 8, 16)).plan(q, q, CallContext(LAYOUT))
    assert made.order is not None
    return made if ordered else replace(made, order=None)


def tensors(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    shape = (2, LAYOUT.length, 3, 64)
    q, k, v = (torch.randn(shape, generator=source).half().transpose(1, 2) for _ in range(3))
    return q, k, v


def same_arguments(one: tuple[Any, ...], other: tuple[Any, ...], moved: dict[int, Tensor]) -> None:
    """Equal launches, but for the tensors in `moved`, by address."""
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        if isinstance(a, Descriptor):
            assert {**vars(a), "base": 0} == {**vars(b), "base": 0}
            a, b = a.base, b.base
        if isinstance(a, Tensor):
            assert b.data_ptr() == moved.get(a.data_ptr(), a).data_ptr()
            assert (b.shape, b.stride()) == (a.shape, a.stride())
        else:
            assert a == b or (a is None and b is None)


def test_portable_launch(jit: Jit) -> None:
    backend = block_sparse.TritonBackend(
        tile=block_sparse.Tile(64, 4, 2, tma=True), interpreted=True
    )
    assert isinstance(backend, PreparingBackend)
    q, k, v = tensors(0)
    result, again = backend.prepare(q, k, v, plan(), 0.125)
    assert again is not None
    others = tensors(1)
    repeated = again(*others)
    fresh, second = jit.seen
    assert len(jit.examined) == 1
    olds, news = (q, k, v, *result), (*others, *repeated)
    same_arguments(fresh, second, {a.data_ptr(): b for a, b in zip(olds, news, strict=True)})
    assert not {x.data_ptr() for x in result} & {x.data_ptr() for x in repeated}


@pytest.mark.parametrize("window", [(1, 7, 9), (2, 16, 16)])
def test_specialised_launches(jit: Jit, window: tuple[int, int, int]) -> None:
    """Full and partial entries in one launch, whose mask is the plan's and stays."""
    one = plan(window)
    mask = hopper.mask_of(one, 0.125)
    assert (mask is not None) == (window == (1, 7, 9))
    q, k, v = (t.contiguous() for t in tensors(0))
    room = rooms.room_for(q, k, v, 0, bounded=False)
    main = hopper.launch(q, k, v, one, 0.125, room.result, mask=mask)
    others = tuple(t.contiguous() for t in tensors(1))
    repeated = block_sparse._again([main.repeatable(room.tensors)], 0, False, *others)
    olds, news = (q, k, v, *room.result), (*others, *repeated)
    moved = {a.data_ptr(): b for a, b in zip(olds, news, strict=True)}
    before, after = jit.seen
    same_arguments(before, after, moved)
    assert len(jit.examined) == 1
    assert any(mask is not None and argument is mask.queries for argument in after) == bool(mask)


def test_nothing_is_kept_of_the_first_call(jit: Jit) -> None:
    q, k, v = tensors(0)
    backend = block_sparse.TritonBackend(interpreted=True)
    result, again = backend.prepare(q, k, v, plan(), 0.125)
    assert again is not None
    kept = [weakref.ref(x) for x in (q, k, v, *result)]
    del q, k, v, result
    jit.seen.clear()
    gc.collect()
    assert [ref() for ref in kept] == [None] * 5


@pytest.mark.parametrize("copied", [False, True])
def test_heads_that_share_keys_are_repeated_too(jit: Jit, copied: bool, monkeypatch: Any) -> None:
    """With and without copies of k and v for every head of q."""
    backend = block_sparse.TritonBackend(interpreted=True)
    monkeypatch.setattr("dit_sparse.attention.backends", lambda precision="bf16": (backend,))
    if copied:
        monkeypatch.setattr(block_sparse.TritonBackend, "groups", lambda self, plan: False)
    for seed in range(2):
        q, k, v = tensors(seed)
        if seed == 0:
            _, prepared = prepare(q, k[:, 1:2], v[:, 1:2], plan())
        else:
            prepared.again(q, k[:, 1:2], v[:, 1:2])
        _, _, k_given, v_given, *_ = jit.seen[-1]
        for given, whole in ((k_given, k), (v_given, v)):
            assert given.shape[1] == (3 if copied else 1)
            assert torch.equal(given, whole[:, 1:2].expand_as(given))
    assert len(jit.examined) == 1  # repeated, not launched anew


def test_one_tensor_in_several_places(jit: Jit) -> None:
    """Self-attention on one and the same tensor, then on three."""
    q, _, _ = tensors(0)
    backend = block_sparse.TritonBackend(interpreted=True)
    _, again = backend.prepare(q, q, q, plan(), 0.125)
    assert again is not None
    others = tensors(1)
    again(*others)
    assert [jit.seen[1][n].data_ptr() for n in (1, 2, 3)] == [x.data_ptr() for x in others]


@pytest.mark.parametrize("heads", [False, True])
def test_an_order_is_a_launch_before(jit: Jit, heads: bool, monkeypatch: Any) -> None:
    """Keys and values are put into plan order; the portable kernel gathers queries itself."""
    rows = Jit(permute._permute_rows, jit.seen, jit.examined)
    monkeypatch.setattr(permute, "_permute_rows", rows)
    q, k, v = tensors(0)
    ordered = plan(ordered=True)
    if heads:
        assert ordered.order is not None
        ordered = replace(ordered, order=Permutation(ordered.order.index.expand(3, -1)))
    _, again = block_sparse.TritonBackend(interpreted=True).prepare(q, k, v, ordered, 0.125)
    assert again is not None
    others = tensors(1)
    result = again(*others)
    assert len(jit.examined) == 2
    first, fresh, second, repeated = jit.seen
    buffer = second[4]
    moved = {k.data_ptr(): others[1], v.data_ptr(): others[2], first[4].data_ptr(): buffer}
    same_arguments(first, second, moved)
    assert buffer.shape == (2, *k.shape)
    at = {n: fresh[1 + n].data_ptr() for n in (0, 1, 2, 5, 6)}
    news = (others[0], *buffer.unbind(), *result)
    same_arguments(fresh, repeated, dict(zip(at.values(), news, strict=True)))


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_a_specialised_kernel_and_what_it_leaves(
    jit: Jit, ordered: bool, bounded: bool, monkeypatch: Any
) -> None:
    """As `_run` does on Hopper: q, k and v in one launch, and the caller's q for the rest."""
    for module, name in ((permute, "_permute_rows"), (norms, "_norms")):
        monkeypatch.setattr(module, name, Jit(getattr(module, name), jit.seen, jit.examined))
    q, k, v = (t.contiguous() for t in tensors(0))
    made = plan(ordered=ordered)
    room, before = rooms.in_order(q, k, v, made, queries=True, bounded=bounded)
    assert len(before) == (ordered or bounded)
    qo, ko, vo = room.ordered
    main = hopper.launch(qo, ko, vo, made, 0.125, room.result, lengths=room.lengths)
    rest = portable.launch(
        q, ko, vo, made, 0.125, block_sparse.Tile(64, 4, 2, tma=True), room.result, part="partial"
    )
    repeats = [one.repeatable(room.tensors) for one in (*before, main, rest)]
    others, seconds = tuple(t.contiguous() for t in tensors(1)), []
    make = rooms.room_for
    monkeypatch.setattr(
        block_sparse, "room_for", lambda *given: seconds.append(make(*given)) or seconds[-1]
    )
    again = block_sparse._again(repeats, 3 if ordered else 0, bounded, *others)
    (second,) = seconds
    assert again is second.result
    if bounded:
        assert not second.lengths[1].any()
    addresses = {a.data_ptr(): b for a, b in zip(room.tensors, second.tensors, strict=True)}
    firsts, seconds = jit.seen[: len(repeats)], jit.seen[len(repeats) :]
    for one, other in zip(firsts, seconds, strict=True):
        same_arguments(one, other, addresses)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_a_tail_reads_the_means_of_its_own_call(
    jit: Jit, ordered: bool, bounded: bool, monkeypatch: Any
) -> None:
    """As `_run` does on Hopper for a tail of zeroth order."""
    homes = {permute: ["_permute_blocks"], tail: ["_tail_fwd", "_tail_bias_fwd"]}
    for home, names in homes.items():
        for name in names:
            monkeypatch.setattr(home, name, Jit(getattr(home, name), jit.seen, jit.examined))
    q, k, v = (t.contiguous() for t in tensors(0))
    made = replace(plan((2, 16, 16), ordered=ordered), tail="zeroth")
    room, before = rooms.in_order(q, k, v, made, queries=True, bounded=bounded, means=True)
    last = tail.launch(room.ordered[0], room.means, made, 0.125, room.result)
    repeats = [one.repeatable(room.tensors) for one in (*before, last)]
    others, seconds = tuple(t.contiguous() for t in tensors(1)), []
    make = rooms.room_for
    monkeypatch.setattr(
        block_sparse, "room_for", lambda *given: seconds.append(make(*given)) or seconds[-1]
    )
    moved = 3 if ordered else 0
    block_sparse._again(repeats, moved, bounded, *others, means=made.k_blocks.n)
    addresses = {a.data_ptr(): b for a, b in zip(room.tensors, seconds[0].tensors, strict=True)}
    launched = [one for one in jit.seen if len(one) != 1 + len(tail._tail_bias_fwd.arg_names)]
    assert len(launched) == 4
    for one, other in zip(launched[:2], launched[2:], strict=True):
        same_arguments(one, other, addresses)
    assert launched[3][2].base is seconds[0].means


def test_views_of_what_changes_are_refused() -> None:
    """They would show the tensors of the first call for ever."""
    q, k, v = tensors(0)
    rows = k.transpose(1, 2).view(-1, 64)
    for argument in (k[:, :1], Descriptor(rows, list(rows.shape), [64, 1], [1, 64])):
        made = launch.Launch(Compiled([]), (1, 1, 1), (q, argument, v))
        with pytest.raises(ValueError, match="got a view 1 of one"):
            made.repeatable((q, k, v))


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize(("ordered", "uneven"), [(False, False), (True, False), (True, True)])
def test_launches_in_8_bits(
    jit: Jit, ordered: bool, uneven: bool, precision: str, monkeypatch: Any
) -> None:
    """The passes before, and full and partial entries; everything between them is new, but not
    the order in which query blocks begin."""
    homes = {
        permute: ["_permute_rows"],
        quantise: [
            *("_extremes_fwd", "_centres_fwd", "_quantise_rows_fwd", "_quantise_values_fwd"),
        ],
        quantised.hopper_quantised: ["_quantised_fwd_hopper"],
    }
    for home, names in homes.items():
        for name in names:
            monkeypatch.setattr(home, name, Jit(getattr(home, name), jit.seen, jit.examined))
    rooms = []
    make = quantised.QuantisedBackend._room
    monkeypatch.setattr(
        quantised.QuantisedBackend,
        "_room",
        lambda *given: rooms.append(make(*given)) or rooms[-1],
    )
    backend = quantised.QuantisedBackend(precision)
    assert isinstance(backend, PreparingBackend)
    q, k, v = (t.contiguous() for t in tensors(0))
    given = replace(plan(ordered=ordered), uneven=uneven)
    _, again = backend.prepare(q, k, v, given, 0.125)
    assert again is not None
    queues = vars(given).pop("_longest_first", {})
    assert set(queues) == ({(2, 3, "full"), (2, 3, "partial")} if uneven else set())
    count = len(jit.seen)
    # Means; keys, queries and values; full and partial entries. In int8 values are moved if at all.
    assert count == (7 if precision == "fp8" else 6 + ordered)
    again(*(t.contiguous() for t in tensors(1)))
    assert len(jit.examined) == count
    pairs = zip(rooms[0].tensors, rooms[1].tensors, strict=True)
    moved = {a.data_ptr(): b for a, b in pairs}
    assert not {x.data_ptr() for x in rooms[0].tensors} & {x.data_ptr() for x in rooms[1].tensors}
    for before, after in zip(jit.seen[:count], jit.seen[count:], strict=True):
        same_arguments(before, after, moved)
    assert "_longest_first" not in vars(given)
    for queue, launched in zip(queues.values(), jit.seen[-2:], strict=False):
        assert any(argument is queue for argument in launched)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_heads_that_share_keys_in_8_bits(jit: Jit, precision: str, monkeypatch: Any) -> None:
    """Copied for every head of q, and repeated as launches."""
    for name in ("_extremes_fwd", "_centres_fwd", "_quantise_rows_fwd", "_quantise_values_fwd"):
        real = Jit(getattr(quantise, name), jit.seen, jit.examined)
        monkeypatch.setattr(quantise, name, real)
    home = quantised.hopper_quantised
    real = Jit(home._quantised_fwd_hopper, jit.seen, jit.examined)
    monkeypatch.setattr(home, "_quantised_fwd_hopper", real)
    backend = quantised.QuantisedBackend(precision)
    monkeypatch.setattr("dit_sparse.attention.backends", lambda precision="bf16": (backend,))
    monkeypatch.setattr(quantised.QuantisedBackend, "refuses", lambda *_: None)
    q, k, v = (t.contiguous() for t in tensors(0))
    _, prepared = prepare(q, k[:, :1], v[:, :1], plan(), precision=precision)
    launches = len(jit.seen)
    assert len(jit.examined) == launches
    prepared.again(q, k[:, :1], v[:, :1])
    assert len(jit.seen) == 2 * launches
    assert len(jit.examined) == launches


def test_interpreted_kernels_are_not_repeated(jit: Jit, monkeypatch: Any) -> None:
    q, k, v = tensors(0)
    monkeypatch.setattr(launch, "_REPEATS", False)
    backend = block_sparse.TritonBackend(interpreted=True)
    assert backend.prepare(q, k, v, plan(), 0.125)[1] is None


def test_addresses_that_are_not_multiples_of_16_have_launches_of_their_own(
    jit: Jit, monkeypatch: Any
) -> None:
    """Triton compiles for each: what q, k or v alone is not aligned for must not be repeated."""
    backend = block_sparse.TritonBackend(interpreted=True)
    monkeypatch.setattr("dit_sparse.attention.backends", lambda precision="bf16": (backend,))
    call = PlannedCall(plan())
    ways = list(itertools.product([False, True], repeat=3))
    for examined, way in enumerate(ways, start=1):
        for seed in range(2):
            inputs = [shift(x) if s else x for x, s in zip(tensors(seed), way, strict=True)]
            assert [bool(x.data_ptr() % 16) for x in inputs] == list(way)
            call.run(*inputs, 0.125, None)
            assert len(jit.examined) == examined
            addresses = [jit.seen[-1][n].data_ptr() for n in (1, 2, 3)]
            assert addresses == [x.data_ptr() for x in inputs]
    assert len(jit.seen) == 2 * len(ways)


def shift(x: Tensor) -> Tensor:
    """A copy with the same strides, two bytes behind a multiple of 16."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    return room.as_strided(x.shape, x.stride(), room.storage_offset()).copy_(x)


def test_kinds_differ_in_all_that_launches_depend_on() -> None:
    q, k, v = tensors(0)
    kinds = [
        kind(q, k, v),
        kind(q.contiguous(), k, v),
        kind(q, k.contiguous(), v),
        kind(q, k, v.contiguous()),
        kind(q.float(), k, v),
        kind(q[:, :, 1:], k, v),
        kind(q, k[:, :, 1:], v),
        kind(shift(q), k, v),
        kind(q, shift(k), v),
        kind(q, k, shift(v)),
        kind(q.contiguous(), k.contiguous(), v.contiguous()),
        kind(q.clone().requires_grad_(), k, v),
    ]
    assert len(set(kinds)) == len(kinds)
    assert kind(*tensors(1)) == kinds[0]


@pytest.mark.parametrize("ordered", [False, True])
def test_prepared_calls_are_those_of_attend(ordered: bool) -> None:
    """Backends that keep nothing run again, permutations included."""
    q, k, v = (t.float() for t in tensors(0))
    one = plan(ordered=ordered)
    out, prepared = prepare(q, k, v, one, backend="reference")
    others = tuple(t.float() for t in tensors(1))
    for got, inputs in ((out, (q, k, v)), (prepared.again(*others), others)):
        expected = attend(*inputs, one, backend="reference")
        assert isinstance(got, AttentionOutput)
        assert all(map(torch.equal, got, expected))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("window", [(1, 7, 9), (2, 16, 16)])
def test_repeated_on_the_device(window: tuple[int, int, int], ordered: bool) -> None:
    """The same bits as a fresh call, also from a CUDA graph."""
    backend, one = block_sparse.BACKEND, plan(window, ordered=ordered).to("cuda")

    def draw(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (t.transpose(1, 2).cuda().transpose(1, 2) for t in tensors(seed))
        return q, k, v

    _, again = backend.prepare(*draw(0), one, 0.125)
    assert again is not None
    for seed in (1, 2):
        got, expected = again(*draw(seed)), backend.run(*draw(seed), one, 0.125)
        assert all(map(torch.equal, got, expected))
    static, graph = draw(3), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = again(*static)
    for tensor, other in zip(static, draw(4), strict=True):
        tensor.copy_(other)
    graph.replay()
    assert all(map(torch.equal, captured, backend.run(*draw(4), one, 0.125)))


@dataclass(frozen=True, eq=False)
class Kernel:
    """Stands for what Triton compiled."""

    asm: dict[str, str]
    n_spills: int

    def _init_handles(self) -> None:
        if self.n_spills < 0:
            raise OutOfResources(300_000, 232_448, "shared memory")


@pytest.mark.parametrize(
    ("ptx", "spills", "reason"),
    [
        ("setmaxnreg.inc", 0, None),
        ("wgmma", 0, "its warps are not specialised"),
        ("setmaxnreg.inc", 200, "it spills 200 registers"),
        ("setmaxnreg.inc", -1, "shared memory"),
        ("", 0, "RuntimeError: PassManager::run failed"),
    ],
)
def test_badly_compiled_kernels_are_refused(
    ptx: str,
    spills: int,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """Looked at once, and never launched."""
    compiled, launched = [], []

    class Function:
        __name__ = "kernel"

        def warmup(self, *arguments: Any, **options: Any) -> Kernel:
            compiled.append(arguments)
            if not ptx:
                raise RuntimeError("PassManager::run failed\nand much more")
            return Kernel({"ptx": ptx}, spills)

    monkeypatch.setattr(launch, "JITFunction", Function)
    monkeypatch.setattr(launch, "launch", lambda *arguments, **_: launched.append(arguments))
    jit, x = Function(), torch.empty(1)
    for _ in range(2):
        done = launch.launch_specialised(jit, (1, 1, 1), (x,), {"D": 64}, warps=4, stages=2)
        assert done is None  # as the stand-in for `launch` returns
    assert len(compiled) == 1
    assert len(launched) == (0 if reason else 2)
    assert bool(reason) == bool(caplog.messages)
    assert reason is None or reason in caplog.messages[0]
    launch.launch_specialised(jit, (1, 1, 1), (x,), {"D": 128}, warps=4, stages=2)
    assert len(compiled) == 2


def test_what_the_driver_says_is_no_flaw(monkeypatch: pytest.MonkeyPatch):
    """A kernel that could not be loaded for lack of memory may be the next time."""

    class Full(Kernel):
        def _init_handles(self) -> None:
            raise RuntimeError("Triton Error [CUDA]: out of memory")

    class Function:
        __name__ = "kernel"

        def warmup(self, *arguments: Any, **options: Any) -> Kernel:
            return kernels.pop()({"ptx": "setmaxnreg.inc"}, 0)

    kernels = [Kernel, Full]
    monkeypatch.setattr(launch, "JITFunction", Function)
    monkeypatch.setattr(launch, "launch", lambda *arguments, **_: "launched")
    call = partial(launch.launch_specialised, Function(), (1, 1, 1), (torch.empty(1),), {})
    with pytest.raises(RuntimeError, match="out of memory"):
        call(warps=4, stages=2)
    assert call(warps=4, stages=2) == "launched"


def test_machine_code_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("not executable")

    monkeypatch.setattr(launch.subprocess, "run", refuse)
    assert launch.machine_code(SimpleNamespace(asm={"cubin": b""})) is None


@pytest.mark.parametrize("other", [torch.empty(1, dtype=torch.float16), 1])
def test_kernels_for_other_kinds_of_arguments_are_looked_at_too(
    other: Any, monkeypatch: pytest.MonkeyPatch
):
    compiled = []

    class Function:
        __name__ = "kernel"

        def warmup(self, *arguments: Any, **options: Any) -> Kernel:
            compiled.append(arguments)
            return Kernel({"ptx": "setmaxnreg.inc"}, 0)

    monkeypatch.setattr(launch, "JITFunction", Function)
    monkeypatch.setattr(launch, "launch", lambda *arguments, **_: "launched")
    call = partial(launch.launch_specialised, Function(), (1, 1, 1), constants={})
    first = torch.empty(1)
    same = first if isinstance(other, torch.Tensor) else 2
    for second in (same, other, same):
        assert call((first, second), warps=4, stages=2) == "launched"
    assert len(compiled) == 2


@pytest.mark.parametrize(
    ("sass", "reason"),
    [
        (None, None),
        ("HGMMA.64x128x16\n" * 4 + "WARPGROUP.DEPBAR.LE gsb0, 0x0\n" * 2, None),
        ("HGMMA.64x128x16\nWARPGROUP.DEPBAR.LE gsb0, 0x0\n" * 4, "waits 4 times for 4 matrix"),
        ("QGMMA.64x128x32\nWARPGROUP.DEPBAR.LE gsb0, 0x0\n" * 3, "waits 3 times for 3 matrix"),
    ],
)
def test_serialised_products_are_seen_in_machine_code(sass: str | None, reason: str | None):
    found = launch.flaw("setmaxnreg.inc", sass, 0)
    assert found is None if reason is None else reason in str(found)


def test_8_bits_say_so_where_their_kernel_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quantised.hopper_quantised, "launch_specialised", lambda *_, **__: None)
    monkeypatch.setattr(quantised, "fill", lambda *_: [])
    q, k, v = (t.contiguous() for t in tensors(0))
    for precision in ("fp8", "int8"):
        with pytest.raises(ValueError, match="that is not used, see the log"):
            quantised.QuantisedBackend(precision).run(q, k, v, plan(), 0.125)
