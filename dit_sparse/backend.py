"""What a kernel backend is. The backends themselves are the modules of `kernels/`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from dit_sparse.plan import BlockPlan

#: What attention multiplies in: the dtype of its inputs (`"bf16"`, whichever that is), all of it in
#: 8-bit floats, or queries and keys in 8-bit integers.
Precision: TypeAlias = Literal["bf16", "fp8", "int8"]


class AttentionOutput(NamedTuple):
    """Attention values and the softmax mass behind them.

    `out` has the shape and dtype of the queries, `lse` is the natural logarithm of the softmax
    denominator, fp32 `[B, H, N]`. A row that reads nothing has `out` 0 and `lse` -inf.
    """

    out: Tensor
    lse: Tensor


class BlockSummaries(NamedTuple):
    """What is known of q, k and v `[B, H, N, D]` in the order of n blocks.

    Args:
        queries: fp32 `[B, H, n, D]`, mean of every block of q, times `D ** -0.5`.
        keys: fp32 `[B, H, n, D]`, mean of every block of k.
        means: `[2, B, H, n, D]`, those of k and of v in their dtype, zeros for hidden blocks;
            `None` where nobody asked for values.
        lengths: fp32 `[B, H, N]`, Euclidean lengths of the queries.
        longest: fp32 `[B, H, n]`, length of the longest key of every block, 0 for hidden ones.
    """

    queries: Tensor
    keys: Tensor
    means: Tensor | None
    lengths: Tensor
    longest: Tensor


@runtime_checkable
class Backend(Protocol):
    """Runs plans."""

    @property
    def name(self) -> str: ...

    @property
    def reorders(self) -> bool:
        """Whether `run` takes tensors in the caller's order and applies `plan.order` itself."""
        ...

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> str | None:
        """A sentence why this backend cannot run the call, or `None` when it can.

        Called in the hot path: must neither copy nor synchronise.
        """
        ...

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
    ) -> AttentionOutput:
        """Attention over the plan's entries.

        Args:
            q: `[B, H, N_q, D]`, any strides; in plan order unless the backend reorders.
            k, v: `[B, H, N_k, D]`, likewise.
            plan: lists for these sizes.
            scale: factor of the scores before the softmax, above 0.
        """
        ...


#: Attention of q, k, v over a plan that was fixed before.
Again: TypeAlias = Callable[[Tensor, Tensor, Tensor], AttentionOutput]


@runtime_checkable
class PreparingBackend(Backend, Protocol):
    """A backend that can keep what it found out about a call for the next one like it."""

    def prepare(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
    ) -> tuple[AttentionOutput, Again | None]:
        """`run`, and the same for tensors of the same shapes, strides, dtypes and device whose
        addresses are as divisible by 16; `None` where nothing can be kept. It keeps no tensor."""
        ...


@runtime_checkable
class SummarisedBackend(Backend, Protocol):
    """A backend that need not measure what planning has measured."""

    def run_summarised(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: BlockPlan,
        scale: float,
        summaries: BlockSummaries,
    ) -> AttentionOutput:
        """`run` with the summaries of q, k and v, in the blocks of a plan without an order."""
        ...


@runtime_checkable
class GroupingBackend(Backend, Protocol):
    """A backend that can read heads of k and v for several heads of q each, without copies."""

    def groups(self, plan: BlockPlan) -> bool:
        """Whether it can with this plan: head h of q then reads head h // (H / H_k)."""
        ...


@cache
def kernel_module(name: str) -> ModuleType | None:
    """A module of `kernels/`; `None` if it needs Triton and there is none."""
    try:
        return importlib.import_module(f"dit_sparse.kernels.{name}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        return None


def planning_module(name: str, x: Tensor) -> ModuleType | None:
    """`kernel_module` of one that plans from tensors like x; `None` where PyTorch has to: on a CPU,
    and on AMD's GPUs, which nobody has run the kernels on. Attention gives known answers there
    first; the kernels that plan are not asked for any."""
    if not x.is_cuda or torch.version.hip is not None:
        return None
    return kernel_module(name)


def refuses_beyond_basics(q: Tensor, v: Tensor) -> str | None:
    """Why a kernel for 16 or 32 bits cannot run a call."""
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"expected bfloat16, float16 or float32, got {q.dtype}."
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"expected a head dim of at most 256, got {max(q.shape[-1], v.shape[-1])}."
    return None
