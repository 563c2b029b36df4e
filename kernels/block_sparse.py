"""Block-sparse attention in Triton: checks, tile choice and launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from dit_sparse.backend import Again, AttentionOutput, refuses_beyond_basics
from dit_sparse.kernels import (
    approximate,
    hopper,
    hopper_persistent,
    norms,
    pool,
    pooled,
    portable,
    tail,
)
from dit_sparse.kernels.launch import Launch, Repeat, refuses_heads
from dit_sparse.kernels.permute import empty, gather, gather_with_means, permute
from dit_sparse.kernels.tiles import Tile, choose_tile, shared_memory
from dit_sparse.mask_product import MaskProduct
from dit_sparse.plan import BlockPlan

_BLOCKS = (16, 32, 64, 128, 256)


# With fewer query tiles the launches for a bound cost more than it saves [H200, head dims 64, 128].
_TILES_WORTH_A_BOUND = 2048


class _Room(NamedTuple):
    """All tensors of a call, which has none but these between its launches.

    Args:
        q, k, v: the caller's.
        moved: those that were put into plan order, as one tensor; `None` if none were.
        ordered: q, k and v as the kernels get them.
        result: what the kernels write.
        lengths: of the queries and of the longest key, if kernels subtract a bound.
        means: of the blocks of k and v, if a tail of them is to follow.
        centres: those of k in fp32, if its slope is to follow too.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    moved: Tensor | None
    ordered: tuple[Tensor, Tensor, Tensor]
    result: AttentionOutput
    lengths: tuple[Tensor, Tensor] | None
    means: Tensor | None = None
    centres: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        moved = () if self.moved is None else (self.moved,)
        return [
            *(self.q, self.k, self.v, *moved, *self.ordered, *self.result),
            *(self.lengths or ()),
            *(x for x in (self.means, self.centres) if x is not None),
        ]


class _Made(NamedTuple):
    """What a call did.

    Args:
        launches: those for exact entries, and for a tail of means alone.
        rest: what adds pooled entries and the tail to the result, if no launch does.
    """

    room: _Room
    launches: list[Launch]
    rest: Callable[[_Room], None] | None


def _room(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    moved: int,
    bounded: bool,
    means: int = 0,
    sloped: bool = False,
) -> _Room:
    """Makes room for a call.

    Args:
        q, k, v: the caller's.
        moved: how many of them, the last ones, are put into plan order.
        bounded: whether lengths are needed.
        means: how many blocks of k and v have means; 0 if none are needed.
        sloped: whether a slope is to follow them.
    """
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    result = AttentionOutput(like(q, v.shape[-1]), lse)
    lengths = norms.empty(q) if bounded else None
    shape = (*k.shape[:2], means, k.shape[3])
    of_blocks = k.new_empty(2, *shape) if means else None
    centres = k.new_empty(shape, dtype=torch.float32) if sloped else None
    if not moved:
        return _Room(q, k, v, None, (q, k, v), result, lengths, of_blocks, centres)
    room = empty((q, k, v)[-moved:])
    *first, k_ordered, v_ordered = room.unbind()
    ordered = (first[0] if first else q, k_ordered, v_ordered)
    return _Room(q, k, v, room, ordered, result, lengths, of_blocks, centres)


@dataclass(frozen=True)
class TritonBackend:
    """The block-sparse kernel of this package.

    Args:
        tile: run the portable kernel with this tile, for measurements and tests.
        bound: whether the Hopper kernel subtracts a bound of the scores instead of their maximum,
            where it may; `None` for where it pays.
        each: query blocks that a program of the Hopper kernel takes; `None` for as many as pay.
        interpreted: run in Triton's interpreter on a CPU; `TRITON_INTERPRET=1` must have been set
            before Triton was imported. For tests: it is slow, and wrong in bfloat16.
    """

    tile: Tile | None = None
    bound: bool | None = None
    each: int | None = None
    interpreted: bool = False

    @property
    def name(self) -> str:
        return "triton"

    @property
    def reorders(self) -> bool:
        return True

    def groups(self, plan: BlockPlan) -> bool:
        return plan.order is None and plan.pools is None and plan.tail == "none"

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> str | None:
        if not q.is_cuda and not self.interpreted:
            return f"expected tensors on a GPU, got {q.device.type}."
        if torch.version.hip is not None:
            return "expected an NVIDIA GPU, got an AMD one."
        if q.is_cuda and hopper.capability(q.device) < (8, 0):
            return f"expected compute capability 8.0 or later, got {hopper.capability(q.device)}."
        if plan.q_blocks.size not in _BLOCKS[:-1] or plan.k_blocks.size not in _BLOCKS:
            return (
                f"expected query blocks of 16 to 128 and key blocks of 16 to 256 tokens, powers of "
                f"two, got {plan.q_blocks.size} and {plan.k_blocks.size}."
            )
        if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
            return "expected inference, got inputs that require gradients."
        return refuses_beyond_basics(q, v) or refuses_heads(q) or self._refuses_size(q, v, plan)

    def _refuses_size(self, q: Tensor, v: Tensor, plan: BlockPlan) -> str | None:
        """Why the portable kernel, which also finishes what others leave, does not fit."""
        if not q.is_cuda:
            return None
        dim = portable.padded(max(q.shape[-1], v.shape[-1]))
        tile = self._tile(q, v, plan)
        needed = shared_memory(tile, dim, q.element_size(), plan.q_blocks.size)
        if needed <= (room := _shared_memory(q.device)):
            return None
        return (
            f"expected a head dim, an element size and query blocks that fit {room // 1024} KiB of "
            f"shared memory, got {dim}, {q.element_size()} bytes and {plan.q_blocks.size} tokens, "
            f"which need {needed // 1024} KiB."
        )

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
    ) -> AttentionOutput:
        return self._on_device(q, k, v, plan, scale).room.result

    def prepare(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
    ) -> tuple[AttentionOutput, Again | None]:
        """`run`, and the same for tensors like these; see `dit_sparse.backend.PreparingBackend`."""
        q, k, v = q.detach(), k.detach(), v.detach()  # objects of their own, to be told apart
        room, launches, rest = self._on_device(q, k, v, plan, scale)
        if any(t.stride(-1) != 1 for t in (q, k, v)):
            return room.result, None  # there are other tensors between the launches
        repeats = [one.repeatable(room.tensors) for one in launches]
        ready = tuple(repeat for repeat in repeats if repeat is not None)
        if len(ready) < len(repeats) or (plan.order is not None and room.moved is None):
            return room.result, None
        moved = 0 if room.moved is None else len(room.moved)
        bounded = room.lengths is not None
        means = 0 if room.means is None else room.means.shape[3]
        sloped = room.centres is not None
        again = partial(_again, ready, moved, bounded, means=means, sloped=sloped, rest=rest)
        return room.result, again

    def _on_device(self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> _Made:
        q, k, v = (unit_stride(t) for t in (q, k, v))
        with device_of(q):
            return self._run(q, k, v, plan, scale)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> _Made:
        on_hopper = self.tile is None and q.is_cuda and hopper.runs(q, v, plan)
        bounded = on_hopper and scale > 0 and self._bounded(q, plan)
        means = on_hopper and tail.runs(q, k, v, plan)
        room, launches = _in_order(q, k, v, plan, queries=on_hopper, bounded=bounded, means=means)
        main = self._specialised(room, plan, scale) if on_hopper else []
        specialised = bool(main)
        if not specialised:
            _, k, v = room.ordered
            main = [portable.launch(q, k, v, plan, scale, self._tile(q, v, plan), room.result)]
        launches += main
        of_tail = plan.tail != "none"
        if room.means is not None and not tail.has_slope(plan):
            launches.append(tail.launch(room.ordered[0], room.means, plan, scale, room.result))
            of_tail = False
        if plan.pools is None and not of_tail:
            return _Made(room, launches, None)
        rest = partial(_approximate, plan, scale, specialised, of_tail)
        rest(room)
        return _Made(room, launches, rest)

    def _bounded(self, q: Tensor, plan: BlockPlan) -> bool:
        if q.dtype != torch.bfloat16:
            return False
        tiles = q.shape[0] * q.shape[1] * plan.q_blocks.n
        return tiles >= _TILES_WORTH_A_BOUND if self.bound is None else self.bound

    def _specialised(self, room: _Room, plan: BlockPlan, scale: float) -> list[Launch]:
        """Runs the Hopper kernel, and the portable one for what it leaves; empty if it cannot."""
        q, (_, k, v), result = room.q, room.ordered, room.result
        mask = hopper.mask_of(plan, scale) if hopper.masks(q) else None
        main = self._main(room, plan, scale, mask)
        if main is None:
            return []
        parts: list[portable.Part] = []
        left = plan.predicate is not None and mask is None and len(plan.masked_rows) > 0
        if room.lengths is not None:
            parts.append("repair full" if left else "repair")
        if left:
            parts.append("partial")
        tile = self._tile(q, v, plan)
        return [
            main,
            *(portable.launch(q, k, v, plan, scale, tile, result, part=part) for part in parts),
        ]

    def _main(
        self, room: _Room, plan: BlockPlan, scale: float, mask: MaskProduct | None
    ) -> Launch | None:
        """Runs the Hopper kernel, on masked entries too if there is a mask."""
        q, lengths = room.ordered[0], room.lengths
        given = (*room.ordered, plan, scale, room.result)
        each = self.each
        if each is None and q.is_cuda and hopper.chosen(q, plan) == "hopper_persistent":
            each = hopper_persistent.blocks_each(q, plan, masked=mask is not None)
        # Masks and running maxima in one loop leave no exponentials under its products.
        if each is not None and each > 1 and (mask is None or lengths is not None):
            done = hopper_persistent.launch(*given, each=each, mask=mask, lengths=lengths)
            if done is not None:
                return done
        return hopper.launch(*given, mask=mask, lengths=lengths)

    def _tile(self, q: Tensor, v: Tensor, plan: BlockPlan) -> Tile:
        return self.tile or choose_tile(
            hopper.capability(q.device),
            portable.padded(max(q.shape[-1], v.shape[-1])),
            q.element_size(),
            plan.q_blocks.size,
            plan.k_blocks.size,
            boxed=plan.masked,
        )


BACKEND = TritonBackend()


def _in_order(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    queries: bool,
    bounded: bool,
    means: bool = False,
) -> tuple[_Room, list[Launch]]:
    """Room for a call, with q, k and v in plan order and lengths measured.

    Args:
        queries: put q into order too; the portable kernel gathers queries itself.
        bounded: measure lengths.
        means: make those of the blocks of k and v, for a tail; queries are then put in order.
    """
    if means:
        moved = 0 if plan.order is None else 3
        room = _room(q, k, v, moved, bounded, plan.k_blocks.n, tail.has_slope(plan))
        assert room.means is not None
        made = gather_with_means(
            q, k, v, plan, room.means, out=room.moved, lengths=room.lengths, centres=room.centres
        )
        return room, [made]
    if plan.order is None:
        room = _room(q, k, v, 0, bounded)
        if room.lengths is None:
            return room, []
        return room, [norms.measure(q, k, room.lengths)]
    given = (q, k, v) if queries else (k, v)
    if len({t.shape for t in given}) == 1:
        room = _room(q, k, v, len(given), bounded)
        assert room.moved is not None
        return room, [gather(given, plan.order, room.moved, room.lengths)]
    *first, k, v = permute(given, plan.order)
    room = _room(q, k, v, 0, bounded)
    room = room._replace(ordered=(first[0] if first else q, k, v))
    if room.lengths is not None:
        norms.measure(*room.ordered[:2], room.lengths)
    return room, []


def _approximate(
    plan: BlockPlan, scale: float, specialised: bool, of_tail: bool, room: _Room
) -> None:
    """Adds pooled entries and a tail to the result for exact entries.

    Args:
        specialised: whether the Hopper kernel may add pooled entries: queries are in order.
        of_tail: whether the result is without the tail.
    """
    q, k, v = room.ordered
    if of_tail and room.means is not None and room.centres is not None:
        slope = pool.slope(k, v, plan.k_blocks, room.centres, plan.hidden)
        tail.launch(q, room.means, plan, scale, room.result, slope)
        of_tail = False
    pools = plan.pools is not None
    if pools and specialised and pooled.launch(*room.ordered, plan, scale, room.result):
        pools = False
    if pools or of_tail:
        approximate.launch(room.q, k, v, plan, scale, room.result, pools=pools, tail=of_tail)


def _again(
    launches: Sequence[Repeat],
    moved: int,
    bounded: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    means: int = 0,
    sloped: bool = False,
    rest: Callable[[_Room], None] | None = None,
) -> AttentionOutput:
    """The launches on other tensors, see `_room`, and what is added to their result."""
    with device_of(q):
        room = _room(q, k, v, moved, bounded, means, sloped)
        hopper.repeat(launches, room.tensors)
        if rest is not None:
            rest(room)
    return room.result


def device_of(q: Tensor) -> AbstractContextManager[None]:
    """Makes the device of q current, which Triton launches on."""
    if not q.is_cuda or q.device.index == torch.cuda.current_device():
        return _NOWHERE_ELSE
    return torch.cuda.device(q.device)


_NOWHERE_ELSE = nullcontext()


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one program may take, as Triton counts them."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def like(q: Tensor, value_dim: int) -> Tensor:
    """An output in the memory order of q, so that [B, N, H, D] models reshape it for free."""
    if value_dim == q.shape[-1]:
        return torch.empty_like(q)
    return q.new_empty(*q.shape[:-1], value_dim)
