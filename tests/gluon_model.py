"""Runs a Gluon kernel for Hopper without a GPU: what Triton's interpreter cannot.

The kernel's own source runs as Python with this module in the place of Gluon. The partitions of a
program take turns at random wherever they touch a barrier, copies arrive and products are computed
at once or as late as waits allow, and shared memory begins as NaN: a missing wait, or a place that
is written while a product still reads it, shows as a wrong result, and partitions that wait for
each other raise.
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dit_sparse.kernels.launch import GluonDescriptor

_IDLE = 2000  # polls of all partitions in which nothing happened
_HASTE = 30  # turns of a partition that is ahead for one of another


class Value:
    """A tensor or a number, with a type whose layout does not matter here."""

    type = SimpleNamespace(layout=None)

    def __init__(self, data: Any) -> None:
        self.data = torch.as_tensor(data)

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def to(self, dtype: torch.dtype) -> Value:
        return Value(self.data.to(dtype))

    def __index__(self) -> int:
        return int(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __neg__(self) -> Value:
        return Value(-self.data)


def _data(x: Any) -> torch.Tensor:
    return x.data if isinstance(x, Value) else torch.as_tensor(x)


def _operator(name: str, swapped: bool) -> Callable[[Value, Any], Any]:
    def apply(self: Value, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        pair = (_data(other), self.data) if swapped else (self.data, _data(other))
        return Value(getattr(torch.Tensor, name)(*pair))

    return apply


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "xor", "and", "or", "rshift"):
    setattr(Value, f"__{_name}__", _operator(f"__{_name}__", False))
    setattr(Value, f"__r{_name}__", _operator(f"__{_name}__", True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name}__", _operator(f"__{_name}__", False))


class Pointer:
    """Into the memory of a tensor; loads and stores must stay inside."""

    def __init__(self, memory: torch.Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, _data(self.offset) + _data(more))

    def where(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        at = _data(self.offset)
        shown = torch.ones_like(at, dtype=torch.bool) & _data(True if mask is None else mask)
        at, shown = torch.broadcast_tensors(at, shown)
        assert bool(((at >= 0) & (at < len(self.memory)))[shown].all()), "outside of its tensor"
        return at, shown


class Descriptor:
    """Tiles of a matrix, 0 outside of it."""

    def __init__(self, matrix: torch.Tensor, block: Sequence[int]) -> None:
        self.matrix, self.block_shape, self.dtype = matrix, list(block), matrix.dtype
        self.layout = None
        self.block_type = SimpleNamespace(nbytes=block[0] * block[1] * matrix.element_size())

    def tile(self, row: int, col: int) -> torch.Tensor:
        found = self.matrix.new_zeros(self.block_shape)
        part = self.matrix[row : row + self.block_shape[0], col : col + self.block_shape[1]]
        found[: part.shape[0], : part.shape[1]] = part
        return found


class Shared:
    def __init__(self, data: Any) -> None:
        self.data = data
        self.shape = getattr(data, "shape", None)
        self.dtype = getattr(data, "dtype", None)

    def index(self, at: Any) -> Any:
        found = self.data[int(at)]
        return found if isinstance(found, Barrier) else Shared(found)

    def slice(self, start: int, length: int) -> Shared:
        return Shared(self.data[start : start + length])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order))


class Barrier:
    count = arrived = expected = phase = 0

    def complete(self, arrived: int, expected: int) -> None:
        assert self.count, "not initialised"
        self.arrived += arrived
        self.expected += expected
        if self.arrived == self.count and not self.expected:
            self.arrived, self.phase = 0, self.phase ^ 1


class Product:
    """Of a warpgroup's own, whose operands are read when it is made."""

    def __init__(self, a: Any, b: Shared, before: Any) -> None:
        self.operands, self.value = (a, b, before), None

    def make(self) -> Value:
        if self.value is None:
            a, b, before = self.operands
            found = a.data.float() @ b.data.float()
            if isinstance(before, Product):  # takes over its sums, waited for or not
                assert before.operands[0].dtype == a.dtype, "sums of another kind of product"
                before = before.make()
            self.value = Value(found if before is None else found + before.data)
        return self.value


def made(x: Any) -> Value:
    if isinstance(x, Product):
        assert x.value is not None, "a product is used before it was waited for"
        return x.value
    return x


def of_model(x: Any) -> Any:
    """An argument of a launch as the model takes it."""
    if isinstance(x, torch.Tensor):
        return Pointer(x.as_strided((x.untyped_storage().size() // x.element_size(),), (1,), 0))
    if isinstance(x, GluonDescriptor):
        return Descriptor(x.base.as_strided(x.shape, x.strides), x.block_shape)
    return x


def launched(
    sources: Sequence[Path], seed: int, given: Sequence[Any], hasty: int | None = None
) -> None:
    """What `launch_specialised` was given of a kernel in some files.

    Args:
        seed, hasty: see `Model`.
    """
    kernel, (grid, *_), arguments, constants = given
    values = [of_model(x) for x in arguments]
    values += [constants[name] for name in kernel.arg_names[len(arguments) :]]
    Model(seed, hasty).run(sources, kernel.__name__, grid, values)


class Model:
    """One program at a time, of which one partition at a time runs.

    Args:
        seed: of the order of events.
        hasty: a partition that runs more often than others, and as far ahead as waits let it.
    """

    def __init__(self, seed: int, hasty: int | None = None) -> None:
        self.hasty = hasty
        self.random = random.Random(seed)
        self.eager = (0.5, 0.0, 1.0)[seed % 3]  # how often products are made when they are begun
        self.copies: list[Callable[[], None]] = []
        self.written: dict[int, torch.Tensor] = {}
        self.local = threading.local()
        self.baton = threading.Condition()
        self.alive: list[int] = []
        self.current = self.idle = 0
        self.error: BaseException | None = None

    def run(self, sources: Sequence[Path], name: str, grid: int, arguments: Sequence[Any]) -> None:
        """Runs the kernel of that name in some files, with its constants among the arguments."""
        space: dict[str, Any] = self.names()
        for source in sources:
            imports = r"^from .* import (?:\([^)]*\)|.*)$"
            text = re.sub(imports, "", source.read_text(encoding="utf-8"), flags=re.M)
            exec(compile(text, str(source), "exec"), space)
        for number in range(grid):
            self.program, self.programs = number, grid
            space[name](*arguments)

    def names(self) -> dict[str, Any]:
        def jit(function: Any = None, **_: Any) -> Any:
            return function or (lambda function: function)

        return {
            "gluon": SimpleNamespace(jit=jit),
            "constexpr_function": jit,
            "gl": self.language(),
            "hopper": SimpleNamespace(
                fence_async_shared=lambda: None,
                warpgroup_mma=self.multiply,
                warpgroup_mma_init=lambda value: value,
                warpgroup_mma_wait=self.wait_for_products,
            ),
            "mbarrier": SimpleNamespace(
                MBarrierLayout=lambda: "barriers",
                init=lambda barrier, count: setattr(barrier, "count", count),
                wait=self.wait,
                expect=self.expect,
                arrive=self.arrive,
            ),
            "tma": SimpleNamespace(async_copy_global_to_shared=self.copy),
        }

    def language(self) -> Any:
        def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Value:
            at, shown = pointer.where(mask)
            memory = pointer.memory if len(pointer.memory) else pointer.memory.new_zeros(1)
            found = memory[torch.where(shown, at, 0)]
            return Value(torch.where(shown, found, torch.as_tensor(other, dtype=found.dtype)))

        def store(pointer: Pointer, value: Value, mask: Any = None) -> None:
            at, shown = pointer.where(mask)
            memory = pointer.memory
            none = torch.zeros(len(memory), dtype=torch.bool)
            written = self.written.setdefault(memory.data_ptr(), none)
            assert not written[at[shown]].any(), "written twice"
            written[at[shown]] = True
            pointer.memory[at[shown]] = value.data.expand_as(at)[shown]

        def allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
            if layout == "barriers":
                return Shared([Barrier() for _ in range(shape[0])])
            return Shared(torch.full(tuple(shape), torch.nan, dtype=dtype))

        def full(shape: Sequence[int], value: Any, dtype: Any, layout: Any) -> Value:
            return Value(torch.full(tuple(shape), value, dtype=dtype))

        def two(function: Any) -> Any:
            return lambda x, y: Value(function(_data(x), _data(y)))

        def layout(*_: Any) -> None:
            return None

        return SimpleNamespace(
            constexpr=lambda x: x, static_range=range, load=load, store=store, full=full,
            int8=torch.int8, int64=torch.int64, float32=torch.float32,
            allocate_shared_memory=allocate,
            program_id=lambda _: Value(self.program), num_programs=lambda _: Value(self.programs),
            where=lambda c, x, y: Value(torch.where(_data(c), _data(x), _data(y))),
            minimum=two(torch.minimum), maximum=two(torch.maximum),
            exp2=lambda x: Value(x.data.exp2()), log2=lambda x: Value(x.data.log2()),
            max=lambda x, axis: Value(x.data.amax(axis)),
            sum=lambda x, axis: Value(x.data.sum(axis)),
            expand_dims=lambda x, axis: Value(x.data.unsqueeze(axis)),
            convert_layout=lambda x, _: x,
            arange=lambda start, end, _: Value(torch.arange(start, end)),
            zeros=lambda shape, dtype, _: Value(torch.zeros(tuple(shape), dtype=dtype)),
            SliceLayout=layout, NVMMADistributedLayout=layout, DotOperandLayout=layout,
            DistributedLinearLayout=layout, warp_specialize=self.specialize,
        )  # fmt: skip

    def specialize(self, partitions: Sequence[Any], warps: Any, registers: Any) -> None:
        self.alive, self.current, self.idle = list(range(len(partitions))), 0, 0

        def partition(number: int, function: Any, arguments: Sequence[Any]) -> None:
            self.local.number, self.local.products = number, []
            try:
                self.await_baton()
                function(*arguments)
                assert not self.local.products, "products were not waited for"
            except BaseException as error:
                self.error = self.error or error
            with self.baton:
                self.alive.remove(number)
                self.current = self.random.choice(self.alive) if self.alive else -1
                self.baton.notify_all()

        threads = [
            threading.Thread(target=partition, args=(number, function, arguments))
            for number, (function, arguments) in enumerate(partitions)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error
        assert not self.copies, "copies that nobody waited for"

    def await_baton(self) -> None:
        with self.baton:
            self.baton.wait_for(lambda: self.current == self.local.number or self.error)
        if self.error is not None:
            raise RuntimeError("Another partition failed.")

    def pause(self, happened: bool = True) -> None:
        """Lets any partition go on; copies arrive meanwhile or not."""
        self.idle = 0 if happened else self.idle + 1
        if self.idle > _IDLE:
            raise RuntimeError("Expected some partition to go on, but all of them wait.")
        while self.copies and self.random.random() < 0.3:
            self.idle = 0
            self.copies.pop(0)()
        weights = [_HASTE if number == self.hasty else 1 for number in self.alive]
        with self.baton:
            (self.current,) = self.random.choices(self.alive, weights)
            self.baton.notify_all()
        self.await_baton()

    def wait(self, barrier: Barrier, phase: Any, pred: Any = True) -> None:
        self.pause()
        while bool(pred) and barrier.phase == int(phase):
            self.pause(happened=False)

    def arrive(self, barrier: Barrier) -> None:
        self.pause()
        barrier.complete(1, 0)

    def expect(self, barrier: Barrier, expected: int, pred: Any = True) -> None:
        self.pause()
        if bool(pred):
            barrier.complete(1, expected)

    def copy(
        self, of: Descriptor, at: Sequence[Any], barrier: Barrier, to: Shared, pred: Any = True
    ) -> None:
        if not bool(pred):
            return
        row, col = (int(x) for x in at)

        def arrive() -> None:
            to.data.copy_(of.tile(row, col))
            barrier.complete(0, -of.block_type.nbytes)

        to.data.fill_(torch.nan)
        self.copies.append(arrive)
        self.pause()

    def multiply(self, a: Any, b: Shared, acc: Any, *, use_acc: Any, is_async: bool) -> Product:
        assert is_async
        product = Product(a, b, acc if bool(use_acc) else None)
        self.local.products.append(product)
        if self.random.random() < self.eager:
            for one in self.local.products:
                one.make()
        self.pause()
        return product

    def wait_for_products(self, running: int, of: Sequence[Any]) -> Any:
        while len(self.local.products) > running:
            product = self.local.products.pop(0)
            # Registers that no wait names are free for other values while the product reads them.
            a = product.operands[0]
            held = isinstance(a, Shared) or any(x is a for x in of)
            assert held, "the end of a product is not told which registers it reads"
            product.make()
        found = tuple(made(x) for x in of)
        return found[0] if len(found) == 1 else found
