"""The same plans through PyTorch's FlexAttention, for devices where the Triton kernel refuses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention import flex_attention as _flex
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dit_sparse.backend import AttentionOutput, refuses_beyond_basics
from dit_sparse.plan import BlockPlan, Blocks

_SIZE = 128  # FlexAttention's blocks are uniform; the plan's blocks may be of any length


@dataclass(frozen=True)
class FlexBackend:
    """FlexAttention over the plan's blocks, cut anew into uniform ones.

    Args:
        eager: run uncompiled on any device. It forms all scores: for tests.
    """

    eager: bool = False

    @property
    def name(self) -> str:
        return "flex"

    @property
    def reorders(self) -> bool:
        return False

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> str | None:
        if not self.eager and not q.is_cuda:
            return f"expected tensors on a GPU, got {q.device.type}."
        if _POWERS_ONLY and any(d & (d - 1) for d in (q.shape[-1], v.shape[-1])):
            return f"expected head dims that are powers of two with torch {torch.__version__}."
        if plan.pools is not None or plan.tail != "none":
            return "expected exact entries only, got pooled entries or a tail."
        if plan.bias is not None or plan.words is not None:
            return "expected entries without bias and words, got some with."
        return refuses_beyond_basics(q, v)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
    ) -> AttentionOutput:
        masks = _MASKS.setdefault(plan, {})
        key = (q.shape[0], q.shape[1])
        if key not in masks:
            masks[key] = block_mask(plan, *key)
        attention: Any = flex_attention if self.eager else _compiled()
        # Every shape and mask compiles anew; past its limit dynamo would run flex uncompiled,
        # which forms all scores.
        with torch._dynamo.config.patch(_LIMIT):
            out, aux = attention(q, k, v, block_mask=masks[key], scale=scale, **_LSE)
        return AttentionOutput(out, (aux if isinstance(aux, Tensor) else aux.lse).float())


BACKEND = FlexBackend()

_POWERS_ONLY = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 7)
# torch 2.9 replaced return_lse by return_aux.
_LSE: dict[str, Any] = (
    {"return_aux": _flex.AuxRequest(lse=True)}
    if hasattr(_flex, "AuxRequest")
    else {"return_lse": True}
)
_LIMIT = {
    name: 1024
    for name in ("recompile_limit", "accumulated_recompile_limit")
    if hasattr(torch._dynamo.config, name)
} or {"cache_size_limit": 1024, "accumulated_cache_size_limit": 1024}
_MASKS: WeakKeyDictionary[BlockPlan, dict[tuple[int, int], BlockMask]] = WeakKeyDictionary()


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def block_mask(plan: BlockPlan, batch: int, heads: int) -> BlockMask:
    """The plan as a FlexAttention block mask for this batch and number of heads."""
    q_of, k_of = plan.q_blocks.of_token, plan.k_blocks.of_token
    visited, predicate = plan.visited, plan.predicate
    whole = visited if predicate is None else plan.listed("full")

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        list_b, list_h = b % visited.shape[0], h % visited.shape[1]
        seen = visited[list_b, list_h, q_of[q], k_of[k]]
        if predicate is None:
            return seen
        lower, upper, above, below = predicate.operands
        row = h % predicate.heads
        inside = predicate.inside(lower[row, q], upper[row, q], above[k], below[k])
        return seen & (whole[list_b, list_h, q_of[q], k_of[k]] | inside)

    rows, columns = _overlap(plan.q_blocks), _overlap(plan.k_blocks)

    def any_of(blocks: Tensor) -> Tensor:
        return rows.mT @ blocks.float() @ columns > 0

    some, open_ = any_of(visited), any_of(~whole)
    full = (some & ~open_).expand(batch, heads, -1, -1)
    partial = (some & open_).expand(batch, heads, -1, -1)
    return BlockMask.from_kv_blocks(
        *_counted(partial),
        *_counted(full),
        BLOCK_SIZE=_SIZE,
        mask_mod=visible,
        seq_lengths=(plan.q_blocks.total, plan.k_blocks.total),
    )


def _overlap(blocks: Blocks) -> Tensor:
    """fp32 `[n, uniform blocks]`: 1 where a block of the plan shares a token with a uniform one."""
    position = torch.arange(blocks.total, device=blocks.starts.device)
    uniform = position // _SIZE
    overlap = torch.zeros(blocks.n, -(-blocks.total // _SIZE), device=position.device)
    overlap[blocks.of_token, uniform] = 1.0
    return overlap


def _counted(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and listed-first indices of a block mask, as FlexAttention wants them."""
    counts = blocks.sum(-1, dtype=torch.int32)
    indices = blocks.int().sort(dim=-1, descending=True, stable=True).indices.int()
    return counts, indices
