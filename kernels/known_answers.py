"""Whether the kernels compute what they should on a GPU that nobody has run them on.

There, the first call of a kind runs a small problem of that kind first, through the launches that
the call would make, and compares it with the reference on the CPU in float64.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from threading import Lock

import torch
import triton
from torch import Tensor

from dit_sparse.backend import AttentionOutput, Backend, GroupingBackend
from dit_sparse.grid import Permutation
from dit_sparse.kernels import reference
from dit_sparse.kernels.architecture import MEASURED, architecture
from dit_sparse.kernels.launch import device_of
from dit_sparse.levels import plan_of_levels
from dit_sparse.plan import BlockPlan, Blocks, Tail
from dit_sparse.predicate import BoxPredicate, DiskPredicate

# As in the GPU tests: of the norm of the result, and of one log-sum-exp.
_ERROR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}
_LSE_ERROR = 5e-3
_HEADS = 2
_LOG = logging.getLogger("dit_sparse")


@dataclass(frozen=True)
class Kind:
    """What decides which kernels a call launches, and how they are compiled.

    Args:
        backend: that would run it.
        dims: head dims of the queries and of the values.
        sizes: of the blocks of queries and of keys.
        masks: what masks partial entries; `""`: nothing.
        order: tensors are put in no order, in one, or each head in its own: 0, 1 or 2.
        factors, tail, uneven: the plan's.
        biased, hidden, ragged: whether the plan has biases, hidden blocks and short key blocks.
        grouped: heads of q share keys and values, which the backend reads so.
    """

    backend: Backend
    architecture: str
    dtype: torch.dtype
    dims: tuple[int, int]
    sizes: tuple[int, int]
    masks: str
    order: int
    factors: tuple[int, ...]
    tail: Tail
    uneven: bool
    biased: bool
    hidden: bool
    ragged: bool
    grouped: bool

    @staticmethod
    def of(backend: Backend, q: Tensor, v: Tensor, plan: BlockPlan) -> Kind:
        named = (name for name in ("box", "disk", "words") if getattr(plan, name) is not None)
        groups = isinstance(backend, GroupingBackend) and backend.groups(plan)
        return Kind(
            backend,
            architecture(q.device),
            q.dtype,
            (q.shape[-1], v.shape[-1]),
            (plan.q_blocks.size, plan.k_blocks.size),
            next(named, ""),
            0 if plan.order is None else plan.order.index.ndim,
            () if plan.pools is None else plan.pools.factors,
            plan.tail,
            plan.uneven,
            plan.bias is not None,
            plan.hidden is not None,
            plan.k_blocks.ragged,
            groups and v.shape[1] < q.shape[1],
        )

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}, head dim {max(self.dims)}, blocks of {self.sizes[0]} and {self.sizes[1]}"


def refusal(backend: Backend, q: Tensor, v: Tensor, plan: BlockPlan) -> str | None:
    """Why kernels must not run a call; `None` where they are known to compute it rightly.

    Waits for the device in the first call of a kind, for some milliseconds and for the compiler,
    on architectures other than `MEASURED`.

    Args:
        backend: runs the small problem as it would run the call, without a question.
        q, v: `[B, H, N, D]`, of the call.
    """
    if architecture(q.device) in MEASURED:
        return None
    kind, known = Kind.of(backend, q, v, plan), _verdicts()
    if kind in known:
        return known[kind]
    with device_of(q):
        capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing:
        return (
            f"expected kernels that were compared with known answers on {kind.architecture}, which "
            "needs a call outside of the capture of a CUDA graph, got none. Call once before it."
        )
    with _LOCK:
        if kind not in known:
            known[kind] = _verdict(kind, q.device)
    return known[kind]


_LOCK = Lock()


@cache
def _verdicts() -> dict[Kind, str | None]:
    """What is known of this process's kernels: why they are not to be used."""
    return {}


def _verdict(kind: Kind, device: torch.device) -> str | None:
    try:
        fault = _fault(kind, device)
    except torch.OutOfMemoryError:  # says nothing of the kernels: the next call asks again
        raise
    except Exception as error:  # compilers and drivers fail in ways of their own
        lines = str(error).strip().splitlines() or ["no reason given"]
        fault = f"{type(error).__name__}: {lines[0]}"
    where = f"on {kind.architecture} (Triton {triton.__version__}, {kind})"
    if fault is None:
        _LOG.info("The kernels, which nobody has run %s, gave known answers.", where)
        return None
    reason = f"expected kernels that give known answers {where}, got {fault}."
    _LOG.warning("The Triton kernels are not used: %s", reason)
    return reason


@torch.no_grad()
def _fault(kind: Kind, device: torch.device) -> str | None:
    """What is wrong with the answers."""
    plan, q, k, v = _problem(kind)
    scale = float(kind.dims[0] ** -0.5)
    got = kind.backend.run(q.to(device), k.to(device), v.to(device), plan.to(device), scale)
    keys, values = (x.double().expand(-1, _HEADS, -1, -1) for x in (k, v))
    expected = _expected(q.double(), keys, values, plan, scale)
    out, lse = got.out.to("cpu", torch.float64), got.lse.to("cpu", torch.float64)
    empty = expected.lse == -torch.inf
    if not torch.equal(lse == -torch.inf, empty) or out[empty].any():
        return "other rows without keys"
    error = float((out - expected.out).norm() / expected.out.norm())
    apart = float((lse - expected.lse)[~empty].abs().max())
    if error <= _ERROR[kind.dtype] and apart <= _LSE_ERROR:  # NaN is no answer either
        return None
    return f"results {error:.1e} and log-sum-exps {apart:.1e} away"


def _problem(kind: Kind) -> tuple[BlockPlan, Tensor, Tensor, Tensor]:
    """A plan and its tensors, on the CPU, whatever the default device is."""
    with torch.device("cpu"):
        plan = _plan(kind)
        source, heads = torch.Generator().manual_seed(1), 1 if kind.grouped else _HEADS
        q, k, v = (
            torch.randn(1, plan.q_blocks.total, n, dim, generator=source, dtype=torch.float32)
            for n, dim in ((_HEADS, kind.dims[0]), (heads, kind.dims[0]), (heads, kind.dims[1]))
        )
    q, k, v = (x.to(kind.dtype).transpose(1, 2) for x in (q, k, v))
    return plan, q, k, v


def _expected(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> AttentionOutput:
    run, order = reference.BACKEND.run, plan.order
    if order is None:
        return run(q, k, v, plan, scale)
    out, lse = run(order(q), order(k), order(v), plan, scale)
    return AttentionOutput(order.undo(out), order.undo(lse.double()))


def _plan(kind: Kind) -> BlockPlan:
    """A few blocks, on the CPU.

    Each row reads the last block; one in three others exactly, one as its means where there are
    any. The last of a row's exact entries is masked.
    """
    source = torch.Generator().manual_seed(0)
    largest = max(kind.sizes)
    runs = [largest + 3 if kind.ragged else 2 * largest, 2 * largest]
    q_blocks, k_blocks = (Blocks.of_runs(runs, size) for size in kind.sizes)
    shape = (1, _HEADS, q_blocks.n, k_blocks.n)
    levels = torch.tensor([0, 1, *(kind.factors or (1,))], dtype=torch.uint8)
    level = levels[torch.randint(len(levels), shape, generator=source)]
    level[..., -1] = 1
    if kind.tail == "none":
        level[0, 0, 0] = 0  # a row that reads nothing
    hidden = None
    if kind.hidden:
        hidden = torch.arange(k_blocks.n)[None] == 1
        level = level.masked_fill(hidden[:, None, None], 0)
    plan = plan_of_levels(
        level, q_blocks, k_blocks, factors=kind.factors, tail=kind.tail, hidden=hidden,
        order=_order(kind.order, sum(runs), source), uneven=kind.uneven,
    )  # fmt: skip
    n = plan.indices.numel()
    if kind.biased:
        plan = replace(plan, bias=torch.randn(n, generator=source, dtype=torch.float32))
    if not kind.masks:
        return plan
    partial = (plan.full > 0).int()
    plan = replace(plan, full=plan.full - partial, partial=partial)
    return _MASKED[kind.masks](plan, source)


def _order(dims: int, tokens: int, source: torch.Generator) -> Permutation | None:
    if not dims:
        return None
    heads = [torch.randperm(tokens, generator=source) for _ in range(_HEADS)]
    return Permutation(heads[0] if dims == 1 else torch.stack(heads))


def _boxed(plan: BlockPlan, source: torch.Generator) -> BlockPlan:
    """Along one axis of 64 places, each with the 9 to both sides."""
    place = torch.arange(plan.k_blocks.total, dtype=torch.int32) % 64
    lower, upper = (place - 9).clamp(min=0), (place + 9).clamp(max=63)
    return replace(plan, box=BoxPredicate(lower[None], upper[None], place, place, guard=64))


def _in_disks(plan: BlockPlan, source: torch.Generator) -> BlockPlan:
    """On 16 columns, within 7 of each place."""
    token = torch.arange(plan.k_blocks.total, dtype=torch.int32)
    place = token // 16 * 65_536 + token % 16
    return replace(plan, disk=DiskPredicate(place[None], torch.full_like(place, 50)[None], place))


def _worded(plan: BlockPlan, source: torch.Generator) -> BlockPlan:
    shape = (plan.indices.numel(), -(-plan.k_blocks.size // 32))
    words = torch.randint(-(2**31), 2**31, shape, generator=source)
    return replace(plan, words=words.int())


_MASKED: dict[str, Callable[[BlockPlan, torch.Generator], BlockPlan]] = {
    "box": _boxed,
    "disk": _in_disks,
    "words": _worded,
}
