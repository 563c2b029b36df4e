"""Plans in 8 bits on Hopper: quantise, then the 8-bit kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.backend import Again, AttentionOutput, Precision
from dit_sparse.kernels import approximate, hopper, hopper_quantised
from dit_sparse.kernels.architecture import architecture
from dit_sparse.kernels.block_sparse import unit_stride
from dit_sparse.kernels.launch import Launch, Repeat, device_of, refuses_heads
from dit_sparse.kernels.permute import empty, gather, permute
from dit_sparse.kernels.portable import padded
from dit_sparse.kernels.quantise import Quantised, fill
from dit_sparse.kernels.quantise import empty as empty_eight
from dit_sparse.kernels.results import empty_result
from dit_sparse.plan import BlockPlan


@dataclass(frozen=True)
class QuantisedBackend:
    """The 8-bit kernel of this package.

    Args:
        precision: `"fp8"`: queries, keys, weights and values in e4m3; `"int8"`: queries and keys in
            integers, weights and values as they are.
    """

    precision: Precision

    @property
    def name(self) -> str:
        return f"triton {self.precision}"

    @property
    def reorders(self) -> bool:
        return True

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> str | None:
        if not q.is_cuda:
            return f"expected tensors on a GPU, got {q.device.type}."
        if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
            return "expected inference, got inputs that require gradients."
        if (reason := refuses_shapes(q, v)) is None and self.precision == "int8":
            reason = refuses_values(v)
        return reason or refuses_plan(plan) or _refuses_device(q, v, plan)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
    ) -> AttentionOutput:
        q, k, v = (unit_stride(t) for t in (q, k, v))
        with device_of(q):
            return self._run(q, k, v, plan, scale)[0].result

    def prepare(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
    ) -> tuple[AttentionOutput, Again | None]:
        """`run`, and the same for tensors like these; see `dit_sparse.backend.PreparingBackend`."""
        if any(t.stride(-1) != 1 for t in (q, k, v)):
            return self.run(q, k, v, plan, scale), None  # others stand between the launches
        q, k, v = q.detach(), k.detach(), v.detach()  # objects of their own, to be told apart
        with device_of(q):
            room, launches = self._run(q, k, v, plan, scale)
        repeats = [one.repeatable(room.tensors) for one in launches]
        ready = tuple(repeat for repeat in repeats if repeat is not None)
        if len(ready) < len(repeats) or not room.whole:
            return room.result, None
        return room.result, partial(self._again, ready, plan, scale)

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
    ) -> tuple[_Room, list[Launch]]:
        room = self._room(q, k, v, plan)
        launches = fill(room.eight, q, k, v, plan)
        if room.moved is not None:
            assert plan.order is not None  # what it was made for
            launches.append(gather((v,), plan.order, room.moved))
        room, attending = _attend(room, plan, scale)
        _add_rest(room, plan, scale)
        return room, launches + attending

    def _again(
        self,
        launches: Sequence[Repeat],
        plan: BlockPlan,
        scale: float,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> AttentionOutput:
        with device_of(q):
            room = self._room(q, k, v, plan)
            hopper.repeat(launches, room.tensors)
            _add_rest(room, plan, scale)
        return room.result

    def _room(self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> _Room:
        integers = self.precision == "int8"
        moved = empty((v,)) if integers and plan.order is not None else None
        return _Room(
            *(q, k, v),
            eight=empty_eight(q, v, plan, integers=integers, values=not integers),
            moved=moved,
            values=v if moved is None else moved[0],
            result=empty_result(q, v.shape[-1]),
        )


class _Room(NamedTuple):
    """All tensors of a call.

    Args:
        q, k, v: the caller's.
        eight: in 8 bits.
        moved: values that were put into plan order, with a leading dimension of 1; `None`: none.
        values: as the kernel gets them, unless in 8 bits.
        result: what the kernel writes.
        whole: whether there are no others.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    eight: Quantised
    moved: Tensor | None
    values: Tensor
    result: AttentionOutput
    whole: bool = True

    @property
    def tensors(self) -> list[Tensor]:
        moved = () if self.moved is None else (self.moved,)
        return [
            *(self.q, self.k, self.v, *self.eight.tensors, *moved, self.values, *self.result),
        ]


def _attend(room: _Room, plan: BlockPlan, scale: float) -> tuple[_Room, list[Launch]]:
    """Writes the result for exact entries.

    Raises:
        ValueError: Triton compiled the kernel badly.
    """
    launches = []
    for masked in (False, True):
        if masked and (plan.box is None or not len(plan.masked_rows)):
            continue
        given = (plan, scale, room.result)
        done = hopper_quantised.launch(room.eight, room.values, *given, partial=masked)
        if done is None and room.eight.v is None:  # strides that descriptors do not take
            values = room.values.clone(memory_format=torch.contiguous_format)
            room = room._replace(values=values, whole=False)
            done = hopper_quantised.launch(room.eight, values, *given, partial=masked)
        if done is None:
            raise ValueError(
                "Expected a kernel in 8 bits that Triton compiles as it was meant to be, got one "
                "that is not used, see the log. Use precision='bf16'."
            )
        launches.append(done)
    return room, launches


def _add_rest(room: _Room, plan: BlockPlan, scale: float) -> None:
    """Adds pooled entries and the tail, whose few rows are not worth 8 bits, to the result."""
    if plan.pools is None and plan.tail == "none":
        return
    k, v = room.k, room.v
    if plan.order is not None:
        k, v = permute([k, v], plan.order)
    approximate.launch(room.q, k, v, plan, scale, room.result)


def refuses_shapes(q: Tensor, v: Tensor) -> str | None:
    """Why the 8-bit kernel does not take tensors like these."""
    if q.element_size() != 2:
        return f"expected bfloat16 or float16, got {q.dtype}."
    if q.shape[-1] != v.shape[-1] or padded(q.shape[-1]) != 128:
        return (
            f"expected one head dim from 65 to 128 in 8 bits, got {q.shape[-1]} and "
            f"{v.shape[-1]}: with fewer, the softmax takes most of the time and 8 bits gain none. "
            "Use precision='bf16'."
        )
    return refuses_heads(q)


def refuses_values(v: Tensor) -> str | None:
    """Why values cannot be read as they are: rows that descriptors address have whole 16 bytes."""
    if v.shape[-1] % 8:
        return (
            f"expected a head dim that is a multiple of 8 in int8, got {v.shape[-1]}. "
            "Use precision='fp8' or 'bf16'."
        )
    return None


def refuses_plan(plan: BlockPlan) -> str | None:
    """Why the 8-bit kernel does not run a plan."""
    if plan.coarse is not None:
        return f"expected a plan without coarse keys in 8 bits, got {plan}. Use precision='bf16'."
    if plan.bias is not None or plan.words is not None:
        return (
            "expected entries without bias and words in 8 bits, got some with. "
            "Use precision='bf16'."
        )
    if plan.disk is not None:
        return "expected entries masked by boxes in 8 bits, got a disk. Use precision='bf16'."
    if plan.q_blocks.size != 128 or plan.k_blocks.size != 128:
        return (
            f"expected blocks of 128 tokens in 8 bits, got {plan.q_blocks.size} and "
            f"{plan.k_blocks.size}. Use block=128 or precision='bf16'."
        )
    return None


def _refuses_device(q: Tensor, v: Tensor, plan: BlockPlan) -> str | None:
    if hopper.runs(q, v, plan):
        if plan.box is None or hopper.masks(q) or not len(plan.masked_rows):
            return None
        return (
            "expected a plan without masked entries in 8 bits, which this version of Triton does "
            "not compile to be trusted, got some. Use windows of whole tiles or precision='bf16'."
        )
    return (
        "expected compute capability 9.0 and Triton 3.6 or later in 8 bits, got "
        f"{architecture(q.device)}. Use precision='bf16'."
    )
