"""Block-sparse attention in Triton: checks, tile choice and launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_sparse.backend import AttentionOutput
from dit_sparse.kernels._block_sparse import _block_sparse_fwd
from dit_sparse.kernels.permute import permute
from dit_sparse.kernels.tiles import Tile, choose_tile
from dit_sparse.plan import BlockPlan

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BLOCKS = (16, 32, 64, 128, 256)
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class TritonBackend:
    """The block-sparse kernel of this package.

    Args:
        tile: overrides the tile table, for measurements.
        interpreted: run in Triton's interpreter on a CPU; `TRITON_INTERPRET=1` must have been set
            before Triton was imported. For tests: it is slow, and wrong in bfloat16.
    """

    tile: Tile | None = None
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
        if q.dtype not in _DTYPES:
            return f"expected bfloat16, float16 or float32, got {q.dtype}."
        if q.is_cuda and _capability(q.device) < (8, 0):
            return f"expected compute capability 8.0 or later, got {_capability(q.device)}."
        if max(q.shape[-1], v.shape[-1]) > 256:
            return f"expected a head dim of at most 256, got {max(q.shape[-1], v.shape[-1])}."
        if plan.q_blocks.size not in _BLOCKS[:-1] or plan.k_blocks.size not in _BLOCKS:
            return (
                f"expected query blocks of 16 to 128 and key blocks of 16 to 256 tokens, powers of "
                f"two, got {plan.q_blocks.size} and {plan.k_blocks.size}."
            )
        if plan.level is not None or plan.tail != "none":
            return "expected exact entries only, got pooled entries or a tail."
        return None

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
    ) -> AttentionOutput:
        q, k, v = (_unit_stride(t) for t in (q, k, v))
        if plan.order is not None:  # queries and results are gathered by the kernel itself
            k, v = permute(k, plan.order), permute(v, plan.order)
        batch, heads, n_queries, head_dim = q.shape
        value_dim = v.shape[-1]
        block_d, block_dv = (max(16, triton.next_power_of_2(d)) for d in (head_dim, value_dim))
        tile = self.tile or choose_tile(
            _capability(q.device),
            max(block_d, block_dv),
            q.element_size(),
            plan.q_blocks.size,
            plan.k_blocks.size,
        )
        out = _like(q, value_dim)
        lse = torch.empty(batch, heads, n_queries, dtype=torch.float32, device=q.device)
        starts, lengths = plan.spans
        order = starts if plan.order is None else plan.order.index
        box = plan.box
        lower, upper, above, below = (
            (box.lower, box.upper, box.above, box.below) if box else (starts,) * 4
        )
        tma = tile.tma and _describable(k) and _describable(v)
        list_b, list_h, _ = _strides_or_zero(plan.offsets)
        grid = (batch * heads * plan.q_blocks.n,)
        _block_sparse_fwd[grid](
            q, k, v,
            TensorDescriptor.from_tensor(k, [1, 1, tile.keys, block_d]) if tma else None,
            TensorDescriptor.from_tensor(v, [1, 1, tile.keys, block_dv]) if tma else None,
            out, lse,
            plan.offsets, plan.full, plan.partial, starts, lengths, plan.q_blocks.starts, order,
            lower, upper, above, below,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            list_b, list_h,
            order.stride(0) if order.ndim == 2 else 0,
            0 if lower.shape[0] == 1 else lower.stride(0),
            heads, plan.q_blocks.n, n_queries, k.shape[2],
            scale * _LOG2_E, box.guard if box else 0,
            D=head_dim, DV=value_dim, BLOCK_D=block_d, BLOCK_DV=block_dv,
            BLOCK_M=plan.q_blocks.size, BLOCK_N=tile.keys, SUB=plan.k_blocks.size // tile.keys,
            RAGGED=plan.k_blocks.ragged, HAS_BOX=box is not None,
            HAS_ORDER=plan.order is not None, TMA=tma,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return AttentionOutput(out, lse)


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


def _describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can address this tensor: 16-byte base and strides."""
    size = x.element_size()
    aligned = all(s > 0 and s * size % 16 == 0 for s in x.stride()[:-1])
    return aligned and x.data_ptr() % 16 == 0


def _strides_or_zero(lists: Tensor) -> list[int]:
    """Strides of the plan's lists, 0 along shared dimensions."""
    return [0 if n == 1 else s for n, s in zip(lists.shape, lists.stride(), strict=True)]
