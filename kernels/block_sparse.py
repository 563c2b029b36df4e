"""Block-sparse attention in Triton: checks, tile choice and launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dit_sparse.backend import AttentionOutput, refuses_beyond_basics
from dit_sparse.kernels import approximate, hopper, portable
from dit_sparse.kernels.permute import permute
from dit_sparse.kernels.tiles import Tile, choose_tile
from dit_sparse.plan import BlockPlan

_BLOCKS = (16, 32, 64, 128, 256)


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
        q, k, v = (_unit_stride(t) for t in (q, k, v))
        if q.is_cuda and q.device.index != torch.cuda.current_device():
            with torch.cuda.device(q.device):  # Triton launches on the current device
                return self._run(q, k, v, plan, scale)
        return self._run(q, k, v, plan, scale)

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
    ) -> AttentionOutput:
        result = AttentionOutput(
            _like(q, v.shape[-1]),
            torch.empty(q.shape[:3], dtype=torch.float32, device=q.device),
        )
        on_hopper = self.tile is None and q.is_cuda and hopper.runs(q, v, plan)
        ordered = q
        if plan.order is not None and on_hopper:
            ordered, k, v = permute((q, k, v), plan.order)
        elif plan.order is not None:  # the portable kernel gathers queries itself
            k, v = permute((k, v), plan.order)
        if not (on_hopper and self._specialised(q, ordered, k, v, plan, scale, result)):
            portable.launch(q, k, v, plan, scale, self._tile(q, v, plan), result)
        if approximate.needed(plan):
            approximate.launch(q, k, v, plan, scale, result)
        return result

    def _specialised(
        self,
        q: Tensor,
        ordered: Tensor,
        k: Tensor,
        v: Tensor,
        plan: BlockPlan,
        scale: float,
        result: AttentionOutput,
    ) -> bool:
        """Runs the Hopper kernel, and the portable one for what it leaves; false if it cannot."""
        bound = self.bound and q.dtype == torch.bfloat16 and scale > 0
        if not hopper.launch(ordered, k, v, plan, scale, result, bound=bound):
            return False
        tile = self._tile(q, v, plan)
        if bound:
            portable.launch(q, k, v, plan, scale, tile, result, part="repair")
        if plan.predicate is not None and not (
            plan.box and hopper.launch(ordered, k, v, plan, scale, result, partial=True)
        ):
            portable.launch(q, k, v, plan, scale, tile, result, part="partial")
        return True

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
