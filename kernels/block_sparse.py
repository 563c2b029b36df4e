"""Block-sparse attention in Triton: checks, tile choice and launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from dit_sparse.backend import Again, AttentionOutput, BlockSummaries, refuses_beyond_basics
from dit_sparse.kernels import (
    approximate,
    hopper,
    hopper_gluon,
    known_answers,
    pool,
    pooled,
    portable,
    tail,
)
from dit_sparse.kernels.architecture import architecture, generation
from dit_sparse.kernels.architecture import refuses as refuses_gpu
from dit_sparse.kernels.launch import Launch, Repeat, device_of, refuses_heads
from dit_sparse.kernels.rooms import Room, in_order, room_for
from dit_sparse.kernels.tiles import Tile, choose_tile, shared_memory
from dit_sparse.kernels.variants import Kernel
from dit_sparse.mask_product import MaskProduct
from dit_sparse.plan import BlockPlan
from dit_sparse.shares import Shares, any_plain, weighing

_BLOCKS = (16, 32, 64, 128, 256)


# With fewer query tiles the launches for a bound cost more than it saves [H200, head dims 64, 128].
_TILES_WORTH_A_BOUND = 2048


class _Made(NamedTuple):
    """What a call did.

    Args:
        launches: those for exact entries, and for a tail of means alone.
        rest: what adds pooled entries and the tail to the result, if no launch does.
    """

    room: Room
    launches: list[Launch]
    rest: Callable[[Room], None] | None


@dataclass(frozen=True)
class TritonBackend:
    """The block-sparse kernel of this package.

    Args:
        tile: run the portable kernel with this tile, for measurements and tests.
        bound: whether the Hopper kernel subtracts a bound of the scores instead of their maximum,
            where it may; `None` for where it pays.
        kernel: the Hopper kernel for whole entries, where it may run; `None` for the table's.
        interpreted: run in Triton's interpreter on a CPU; `TRITON_INTERPRET=1` must have been set
            before Triton was imported. For tests: it is slow, and wrong in bfloat16.
    """

    tile: Tile | None = None
    bound: bool | None = None
    kernel: Kernel | None = None
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
        if q.is_cuda and (reason := refuses_gpu(architecture(q.device))) is not None:
            return reason
        if plan.q_blocks.size not in _BLOCKS[:-1] or plan.k_blocks.size not in _BLOCKS:
            return (
                f"expected query blocks of 16 to 128 and key blocks of 16 to 256 tokens, powers of "
                f"two, got {plan.q_blocks.size} and {plan.k_blocks.size}."
            )
        if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
            return "expected inference, got inputs that require gradients."
        return (
            refuses_beyond_basics(q, v)
            or refuses_heads(q)
            or self._refuses_size(q, v, plan)
            or known_answers.refusal(self, q, v, plan)
            or (None if plan.coarse is None else self.refuses(q, k, v, plan.coarse.plan))
        )

    def _refuses_size(self, q: Tensor, v: Tensor, plan: BlockPlan) -> str | None:
        """Why the portable kernel, which also finishes what others leave, does not fit."""
        if not q.is_cuda:
            return None
        dim = portable.padded(max(q.shape[-1], v.shape[-1]))
        name, size = architecture(q.device), q.element_size()
        if generation(name)[0] == "rdna" and (plan.pools is not None or plan.tail != "none"):
            return (
                f"expected a plan without pooled entries and tails on {name}, for which Triton "
                "keeps a hundred registers and more of those kernels in memory, got one with."
            )
        tile = self._tile_or_none(q, v, plan)
        if tile is None:
            return (
                f"expected elements of 16 bits and a head dim of at most 128 on {name}, or 32 bits "
                f"and 64, got {8 * size} bits and {dim}."
            )
        amd = name.startswith("gfx")
        needed = shared_memory(tile, dim, size, plan.q_blocks.size, amd=amd)
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

    def run_summarised(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: BlockPlan,
        scale: float,
        summaries: BlockSummaries,
    ) -> AttentionOutput:
        """See `dit_sparse.backend.SummarisedBackend`."""
        return self._on_device(q, k, v, plan, scale, summaries).room.result

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

    def _on_device(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: BlockPlan,
        scale: float,
        summaries: BlockSummaries | None = None,
    ) -> _Made:
        q, k, v = (unit_stride(t) for t in (q, k, v))
        with device_of(q):
            return self._run(q, k, v, plan, scale, summaries)

    def _run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: BlockPlan,
        scale: float,
        summaries: BlockSummaries | None,
    ) -> _Made:
        on_hopper = self.tile is None and q.is_cuda and hopper.runs(q, v, plan)
        if on_hopper and (plan.bias is not None or plan.words is not None):
            on_hopper = self._marks(q, plan, scale) or any_plain(plan)
        bounded = on_hopper and scale > 0 and self._bounded(q, plan)
        means = on_hopper and tail.runs(q, k, v, plan)
        known = summaries if on_hopper else None
        room, launches = in_order(
            q, k, v, plan, queries=on_hopper, bounded=bounded, means=means, summaries=known
        )
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
        kernel = self._kernel(q, plan) if specialised else "portable"
        rest = partial(_approximate, plan, scale, kernel, of_tail)
        rest(room)
        return _Made(room, launches, rest)

    def _bounded(self, q: Tensor, plan: BlockPlan) -> bool:
        if q.dtype != torch.bfloat16:
            return False
        tiles = q.shape[0] * q.shape[1] * plan.q_blocks.n
        return tiles >= _TILES_WORTH_A_BOUND if self.bound is None else self.bound

    def _specialised(self, room: Room, plan: BlockPlan, scale: float) -> list[Launch]:
        """Runs the Hopper kernel, and the portable one for what it leaves; empty if it cannot."""
        q, (_, k, v), result = room.q, room.ordered, room.result
        made = self._in_gluon(room, plan, scale) or _in_triton(room, plan, scale)
        if made is None:
            return []
        main, work = made
        parts: list[tuple[BlockPlan, portable.Part]] = []
        if room.lengths is not None:
            parts.append((work.main, "repair full" if work.part == "partial" else "repair"))
        if work.rest is not None:
            parts.append((work.rest, work.part))
        tile = self._tile(q, v, plan)
        return [
            main,
            *(portable.launch(q, k, v, x, scale, tile, result, part=part) for x, part in parts),
        ]

    def _kernel(self, q: Tensor, plan: BlockPlan) -> Kernel:
        return self.kernel or (hopper.chosen(q, plan.k_blocks) if q.is_cuda else "hopper")

    def _marks(self, q: Tensor, plan: BlockPlan, scale: float) -> bool:
        """Whether the Hopper kernel is that in Gluon, which adds biases and reads words itself."""
        chosen = self._kernel(q, plan) == "hopper_gluon"
        return chosen and hopper_gluon.refuses(weighing(plan), scale) is None

    def _in_gluon(self, room: Room, plan: BlockPlan, scale: float) -> tuple[Launch, _Work] | None:
        """Runs the kernel in Gluon, if it is chosen and can."""
        if not self._marks(room.q, plan, scale):
            return None
        work = _work(room.q, plan, scale, marks=True)
        given = (*room.ordered, work.main, scale, room.result)
        done = hopper_gluon.launch(*given, mask=work.mask, lengths=room.lengths)
        return None if done is None else (done, work)

    def _tile(self, q: Tensor, v: Tensor, plan: BlockPlan) -> Tile:
        tile = self._tile_or_none(q, v, plan)
        assert tile is not None  # refused before
        return tile

    def _tile_or_none(self, q: Tensor, v: Tensor, plan: BlockPlan) -> Tile | None:
        return self.tile or choose_tile(
            architecture(q.device),
            portable.padded(max(q.shape[-1], v.shape[-1])),
            q.element_size(),
            plan.q_blocks.size,
            plan.k_blocks.size,
            boxed=plan.masked or plan.bias is not None,
        )


BACKEND = TritonBackend()


class _Work(NamedTuple):
    """What the specialised kernel and the portable one do of a plan's exact entries.

    Args:
        main: a plan whose full entries the specialised kernel runs, and the partial ones that
            words mask if it knows them.
        mask: with which it runs the partial ones of a box too.
        rest: the plan that has what is left; `None`: nothing is.
        part: of it.
    """

    main: BlockPlan
    mask: MaskProduct | None
    rest: BlockPlan | None = None
    part: portable.Part = "added"


def _work(q: Tensor, plan: BlockPlan, scale: float, *, marks: bool) -> _Work:
    """Who does what of a plan.

    Args:
        marks: whether the specialised kernel adds biases and reads words.
    """
    masks = hopper.masks(q)
    if plan.bias is None or marks:
        plan = weighing(plan)
        mask = hopper.mask_of(plan, scale) if masks else None
        masked = plan.predicate is not None if marks else plan.masked
        left = masked and mask is None and len(plan.masked_rows) > 0
        return _Work(plan, mask, plan, "partial") if left else _Work(plan, mask)
    if masks and plan.box is not None:
        shares = Shares.of(plan, masked=True)
        if (mask := hopper.mask_of(shares.plain, scale)) is not None:
            return _Work(shares.plain, mask, shares.rest)
    shares = Shares.of(plan, masked=False)
    return _Work(shares.plain, None, shares.rest)


def _in_triton(room: Room, plan: BlockPlan, scale: float) -> tuple[Launch, _Work] | None:
    """Runs the Hopper kernel that knows no biases and no words, if it can."""
    work = _work(room.q, plan, scale, marks=False)
    given = (*room.ordered, work.main, scale, room.result)
    done = hopper.launch(*given, mask=work.mask, lengths=room.lengths)
    return None if done is None else (done, work)


def _approximate(plan: BlockPlan, scale: float, kernel: Kernel, of_tail: bool, room: Room) -> None:
    """Adds pooled entries and a tail to the result for exact entries.

    Args:
        kernel: the one for exact entries; if specialised, queries are in order, and one like it
            may add pooled entries.
        of_tail: whether the result is without the tail.
    """
    q, k, v = room.ordered
    if of_tail and room.means is not None and room.centres is not None:
        slope = pool.slope(k, v, plan.k_blocks, room.centres, plan.hidden)
        tail.launch(q, room.means, plan, scale, room.result, slope)
        of_tail = False
    pools = plan.pools is not None
    given = (*room.ordered, plan, scale, room.result, room.lengths)
    if pools and kernel != "portable" and pooled.launch(*given, kernel=kernel):
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
    rest: Callable[[Room], None] | None = None,
) -> AttentionOutput:
    """The launches on other tensors, see `_room`, and what is added to their result."""
    with device_of(q):
        room = room_for(q, k, v, moved, bounded, means, sloped)
        hopper.repeat(launches, room.tensors)
        if rest is not None:
            rest(room)
    return room.result


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one program may take, as Triton counts them."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
