"""Block-sparse attention in Triton: checks, tile choice and launch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.backend import Again, AttentionOutput, refuses_beyond_basics
from dit_sparse.kernels import approximate, hopper, portable
from dit_sparse.kernels.launch import Launch, Repeat
from dit_sparse.kernels.permute import empty, gather, permute
from dit_sparse.kernels.tiles import Tile, choose_tile
from dit_sparse.plan import BlockPlan

_BLOCKS = (16, 32, 64, 128, 256)


class _Made(NamedTuple):
    """A call that was made.

    Args:
        result: what it gave.
        tensors: q, q in plan order where that was needed, k, v as the kernels got them.
        launches: of the kernels.
        gather: what was put into plan order in one launch, and that launch.
    """

    result: AttentionOutput
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    launches: list[Launch]
    gather: tuple[Tensor, Launch] | None


@dataclass(frozen=True)
class TritonBackend:
    """The block-sparse kernel of this package.

    Args:
        tile: run the portable kernel with this tile, for measurements and tests.
        bound: let the Hopper kernel subtract a bound of the scores instead of their maximum.
        interpreted: run in Triton's interpreter on a CPU; `TRITON_INTERPRET=1` must have been set
            before Triton was imported. For tests: it is slow, and wrong in bfloat16.
    """

    tile: Tile | None = None
    bound: bool = False
    interpreted: bool = False

    @property
    def name(self) -> str:
        return "triton"

    @property
    def reorders(self) -> bool:
        return True

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> str | None:
        if not q.is_cuda and not self.interpreted:
            return f"expected tensors on a GPU, got {q.device.type}."
        if torch.version.hip is not None:
            return "expected an NVIDIA GPU, got an AMD one."
        if q.is_cuda and _capability(q.device) < (8, 0):
            return f"expected compute capability 8.0 or later, got {_capability(q.device)}."
        if plan.q_blocks.size not in _BLOCKS[:-1] or plan.k_blocks.size not in _BLOCKS:
            return (
                f"expected query blocks of 16 to 128 and key blocks of 16 to 256 tokens, powers of "
                f"two, got {plan.q_blocks.size} and {plan.k_blocks.size}."
            )
        if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
            return "expected inference, got inputs that require gradients."
        return refuses_beyond_basics(q, v)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
    ) -> AttentionOutput:
        return self._on_device(q, k, v, plan, scale).result

    def prepare(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
    ) -> tuple[AttentionOutput, Again | None]:
        """`run`, and the same for tensors like these; see `dit_sparse.backend.PreparingBackend`."""
        q, k, v = q.detach(), k.detach(), v.detach()  # objects of their own, to be told apart
        made = self._on_device(q, k, v, plan, scale)
        if approximate.needed(plan) or self.bound or any(t.stride(-1) != 1 for t in (q, k, v)):
            return made.result, None  # there are other tensors between the launches
        reorder = None
        if plan.order is not None:
            if made.gather is None:
                return made.result, None
            moved, launch = made.gather
            reorder = launch.repeatable((q, k, v, moved))
        repeats = [one.repeatable((*made.tensors, *made.result)) for one in made.launches]
        ready = tuple(repeat for repeat in repeats if repeat is not None)
        if len(ready) < len(repeats) or (reorder is None and plan.order is not None):
            return made.result, None
        of = 3 if made.tensors[1] is not made.tensors[0] else 2
        return made.result, partial(_again, ready, reorder, of)

    def _on_device(self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> _Made:
        q, k, v = (_unit_stride(t) for t in (q, k, v))
        with _device_of(q):
            return self._run(q, k, v, plan, scale)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> _Made:
        result = _empty(q, v)
        on_hopper = self.tile is None and q.is_cuda and hopper.runs(q, v, plan)
        ordered, moved = q, None
        if plan.order is not None:
            # The portable kernel gathers queries itself.
            given = (q, k, v) if on_hopper else (k, v)
            if k.shape == v.shape and given[0].shape == k.shape:
                moved = gather(given, plan.order)
                *first, k, v = moved[0].unbind()
            else:
                *first, k, v = permute(given, plan.order)
            ordered = first[0] if first else q
        launches = []
        if on_hopper:
            launches = self._specialised(q, ordered, k, v, plan, scale, result)
        if not launches:
            tile = self._tile(q, v, plan)
            launches = [portable.launch(q, k, v, plan, scale, tile, result)]
        if approximate.needed(plan):
            approximate.launch(q, k, v, plan, scale, result)
        return _Made(result, (q, ordered, k, v), launches, moved)

    def _specialised(
        self,
        q: Tensor,
        ordered: Tensor,
        k: Tensor,
        v: Tensor,
        plan: BlockPlan,
        scale: float,
        result: AttentionOutput,
    ) -> list[Launch]:
        """Runs the Hopper kernel, and the portable one for what it leaves; empty if it cannot."""
        bound = self.bound and q.dtype == torch.bfloat16 and scale > 0
        first = hopper.launch(ordered, k, v, plan, scale, result, bound=bound)
        if first is None:
            return []
        launches = [first]
        tile = self._tile(q, v, plan)
        if bound:
            launches.append(portable.launch(q, k, v, plan, scale, tile, result, part="repair"))
        if plan.predicate is not None:
            masked = None
            if plan.box:
                masked = hopper.launch(ordered, k, v, plan, scale, result, partial=True)
            if masked is None:
                masked = portable.launch(q, k, v, plan, scale, tile, result, part="partial")
            launches.append(masked)
        return launches

    def _tile(self, q: Tensor, v: Tensor, plan: BlockPlan) -> Tile:
        return self.tile or choose_tile(
            _capability(q.device),
            portable.padded(max(q.shape[-1], v.shape[-1])),
            q.element_size(),
            plan.q_blocks.size,
            plan.k_blocks.size,
            boxed=plan.predicate is not None,
        )


BACKEND = TritonBackend()


def _again(
    launches: Sequence[Repeat], reorder: Repeat | None, of: int, q: Tensor, k: Tensor, v: Tensor
) -> AttentionOutput:
    """The launches on other tensors, the last `of` of which are put into plan order first."""
    result, ordered = _empty(q, v), q
    with _device_of(q):
        if reorder is not None:
            moved = empty((q, k, v)[-of:])
            reorder((q, k, v, moved))
            *first, k, v = moved.unbind()
            ordered = first[0] if first else q
        hopper.repeat(launches, (q, ordered, k, v, *result))
    return result


def _empty(q: Tensor, v: Tensor) -> AttentionOutput:
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return AttentionOutput(_like(q, v.shape[-1]), lse)


def _device_of(q: Tensor) -> AbstractContextManager[None]:
    """Makes the device of q current, which Triton launches on."""
    if not q.is_cuda or q.device.index == torch.cuda.current_device():
        return _NOWHERE_ELSE
    return torch.cuda.device(q.device)


_NOWHERE_ELSE = nullcontext()


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(q: Tensor, value_dim: int) -> Tensor:
    """An output in the memory order of q, so that [B, N, H, D] models reshape it for free."""
    if value_dim == q.shape[-1]:
        return torch.empty_like(q)
    return q.new_empty(*q.shape[:-1], value_dim)
