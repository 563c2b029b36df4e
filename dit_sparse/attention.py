"""Runs a plan: order, kernel, undo. The only place where order and kernels meet."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.backend import (
    Again,
    AttentionOutput,
    Backend,
    GroupingBackend,
    Precision,
    PreparingBackend,
    SummarisedBackend,
    kernel_module,
)
from dit_sparse.coarse import means, one_softmax
from dit_sparse.grid import TokenLayout
from dit_sparse.method import CallContext, SparseMethod
from dit_sparse.plan import BlockPlan
from dit_sparse.plan_check import check_for
from dit_sparse.summaries import Summaries

_BACKENDS = ("block_sparse", "flex", "reference")


@cache
def backends(precision: Precision = "bf16") -> tuple[Backend, ...]:
    """Every backend that can be imported here, in order of preference.

    Names in 8 bits end in the precision. Their reference rounds as their kernels do.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in get_args(Precision):
        raise ValueError(
            f"Expected a precision among {', '.join(get_args(Precision))}, got {precision!r}."
        )
    if precision != "bf16":
        quantised, emulated = kernel_module("quantised"), kernel_module("emulated")
        assert emulated is not None  # it needs no Triton
        fast = () if quantised is None else (quantised.QuantisedBackend(precision),)
        return (*fast, emulated.EmulatedBackend(precision))
    modules = map(kernel_module, _BACKENDS)
    return tuple(module.BACKEND for module in modules if module is not None)


def select_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    name: str | None = None,
    precision: Precision = "bf16",
) -> tuple[Backend, tuple[str, ...]]:
    """The first backend that does not refuse, and the refusals of those before it.

    Args:
        q, k, v: `[B, H, N, D]`; only shapes, dtypes, strides and devices are looked at.
        plan: what would run.
        name: consider only this backend.
        precision: of the products. In 8 bits on a GPU the reference is considered only by name: it
            is there to tell what they cost in quality, and slow.

    Raises:
        ValueError: no such backend or precision, or all that are considered refuse.
    """
    candidates = backends(precision)
    if name is not None:
        candidates = tuple(b for b in candidates if _family(b) == name)
        if not candidates:
            raise ValueError(_unknown_backend(name, precision))
    elif precision != "bf16" and q.is_cuda:
        candidates = tuple(b for b in candidates if _family(b) != "reference")
    refusals: list[str] = []
    for backend in candidates:
        reason = backend.refuses(q, k, v, plan)
        if reason is None:
            return backend, tuple(refusals)
        refusals.append(f"{backend.name}: {reason}")
    raise ValueError(f"No attention backend runs this call. {' '.join(refusals)}")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    backend: Backend | str | None = None,
    precision: Precision = "bf16",
) -> AttentionOutput:
    """Block-sparse attention in the caller's token order.

    Args:
        q: `[B, H, N_q, D]`, any strides; fp32, fp16 or bf16 (what the backend takes).
        k, v: `[B, H_k, N_k, D]` and `[B, H_k, N_k, D_v]`, the same dtype and device. H_k is H, or
            divides it: query head h then reads key head h // (H / H_k), which is copied for it
            unless the backend is a `GroupingBackend` that can do without.
        plan: what every query block reads; its order is applied here and undone on the result.
        scale: factor of the scores, `D ** -0.5` by default; the plan's own factor comes on top.
        backend: a backend, its name, or `None` for the best one that does not refuse.
        precision: of the products, unless a backend is given, which has its own.

    Returns:
        Values in the dtype of `q` and the natural log-sum-exp of the scores, fp32 `[B, H, N_q]`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together or do not fit the plan, or no
            backend runs the call.
    """
    _check(q, k, v, plan)
    scale = _scale(q, scale, plan)
    if backend is None or isinstance(backend, str):
        backend, _ = select_backend(q, k, v, plan, backend, precision)
    elif (reason := backend.refuses(q, k, v, plan)) is not None:
        raise ValueError(f"No attention backend runs this call. {backend.name}: {reason}")
    return _run(backend, plan, scale, q, k, v)


def plan_and_attend(
    method: SparseMethod,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: CallContext,
    *,
    scale: float | None = None,
    backend: str | None = None,
    precision: Precision = "bf16",
) -> AttentionOutput:
    """A method's plan, and `attend` with it.

    Faster than the two apart for methods that plan from q and k: what planning measures of them,
    attention does not measure again.

    Args:
        q, k, v: see `attend`; in the model's order, unless `context.ordered`.
        context: of the call; its values are v.

    Raises:
        ValueError: what the method and `attend` raise.
    """
    summaries = Summaries(q, k, v)
    plan = method.plan(q, k, replace(context, values=v, summaries=summaries))
    return prepare(
        *(q, k, v, plan),
        scale=scale,
        backend=backend,
        precision=precision,
        summaries=summaries,
        keep=False,
    )[0]


@dataclass(frozen=True, eq=False)
class Prepared:
    """What one call of `attend` found out, for calls on tensors like those.

    Args:
        backend: the one that ran.
        refusals: of those preferred to it.
        again: the same attention without any check.
    """

    backend: Backend
    refusals: tuple[str, ...]
    again: Again


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    backend: str | None = None,
    precision: Precision = "bf16",
    summaries: Summaries | None = None,
    keep: bool = True,
) -> tuple[AttentionOutput, Prepared]:
    """`attend`, and how to repeat it on tensors of the same `kind`; raises what `attend` does.

    Args:
        summaries: of this call, where `plan` was made from its tensors. What they spare is not
            spared to a repeated call, whose tensors are others.
        keep: whether there is going to be one; otherwise nothing is made ready for it, which takes
            the host longer than the call itself.
    """
    _check(q, k, v, plan)
    scale = _scale(q, scale, plan)
    chosen, refusals = select_backend(q, k, v, plan, backend, precision)
    again: Again | None = None
    known = None if summaries is None else summaries.of(q, k, v, plan)
    if known is not None and isinstance(chosen, SummarisedBackend):
        out = chosen.run_summarised(q, k, v, plan, scale, known)
        return out, Prepared(chosen, refusals, partial(_run, chosen, plan, scale))
    whole = keep and (plan.order is None or chosen.reorders)
    if whole and plan.coarse is None and isinstance(chosen, PreparingBackend):
        whole_k, whole_v = _for_every_head(chosen, plan, q, k, v)
        out, again = chosen.prepare(q, whole_k, whole_v, plan, scale)
        if again is not None and whole_k is not k:
            again = partial(_copying, chosen, plan, again)
    else:
        out = _run(chosen, plan, scale, q, k, v)
    return out, Prepared(chosen, refusals, again or partial(_run, chosen, plan, scale))


def kind(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """Everything about the tensors of a call that decides who runs it, and how; hashable."""
    return (
        *(q.shape, q.stride(), q.dtype, q.device),
        *(k.shape, k.stride(), k.dtype, k.device),
        *(v.shape, v.stride(), v.dtype, v.device),
        (q.data_ptr() % 16 == 0, k.data_ptr() % 16 == 0, v.data_ptr() % 16 == 0),
        torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
    )


def _run(
    backend: Backend, plan: BlockPlan, scale: float, q: Tensor, k: Tensor, v: Tensor
) -> AttentionOutput:
    k, v = _for_every_head(backend, plan, q, k, v)
    result = _run_lists(backend, plan, scale, q, k, v)
    if (coarse := plan.coarse) is None:
        return result
    return one_softmax(
        result, backend.run(q, means(coarse, k), means(coarse, v), coarse.plan, scale)
    )


def _for_every_head(
    backend: Backend, plan: BlockPlan, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values for each head of q, copied where several share them unless the backend reads
    them so."""
    if (group := q.shape[1] // k.shape[1]) == 1:
        return k, v
    if plan.coarse is None and isinstance(backend, GroupingBackend) and backend.groups(plan):
        return k, v
    return k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)


def _copying(
    backend: Backend, plan: BlockPlan, again: Again, q: Tensor, k: Tensor, v: Tensor
) -> AttentionOutput:
    return again(q, *_for_every_head(backend, plan, q, k, v))


def _run_lists(
    backend: Backend, plan: BlockPlan, scale: float, q: Tensor, k: Tensor, v: Tensor
) -> AttentionOutput:
    if plan.order is None or backend.reorders:
        return backend.run(q, k, v, plan, scale)
    order = plan.order
    out, lse = backend.run(order(q), order(k), order(v), plan, scale)
    return AttentionOutput(order.undo(out), order.undo(lse))


def _scale(q: Tensor, scale: float | None, plan: BlockPlan) -> float:
    """The factor of the scores: the caller's or the usual one, times the plan's."""
    if scale is None:
        return float(q.shape[-1] ** -0.5) * plan.scale
    if not scale > 0.0:
        raise ValueError(f"Expected a scale above 0, got {scale}.")
    return scale * plan.scale


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    layout: TokenLayout | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Dense attention through the SDPA backend that PyTorch prefers for the call.

    Args:
        q, k, v: `[B, H, N, D]`.
        scale: factor of the scores, `D ** -0.5` by default.
        layout: padding tokens of its text are cut out of k and v: a mask that only says a length
            makes dense attention slower.
        mask: anything else that SDPA accepts as `attn_mask`; beside padding it must say that too,
            so both together are refused.

    Raises:
        ValueError: padding for another batch size, or padding and a mask.
    """
    batch = None if layout is None else layout.batch
    if batch is not None and mask is not None:
        raise ValueError(
            f"Expected a mask or a layout with padding, got both ({layout}). Hide the padding in "
            "the mask and leave the layout out."
        )
    if batch is None or layout is None:
        return _sdpa(q, k, v, scale, mask)
    if batch != q.shape[0]:
        raise ValueError(
            f"Expected text lengths for a batch of {q.shape[0]}, got {batch} ({layout})."
        )
    ranges = [layout.valid_ranges(entry) for entry in range(batch)]
    if all(r == ranges[0] for r in ranges):
        return _sdpa(q, _keep(k, ranges[0]), _keep(v, ranges[0]), scale, None)
    parts = []
    for entry, kept in enumerate(ranges):
        one = slice(entry, entry + 1)
        parts.append(_sdpa(q[one], _keep(k[one], kept), _keep(v[one], kept), scale, None))
    return torch.cat(parts)


def _keep(x: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    parts = [x[:, :, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
    # The choice is left to PyTorch, which takes cuDNN on Hopper: asking for an order of preference
    # (sdpa_kernel with set_priority) before its first own choice leaves flash in front for good.
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _check(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> None:
    if (
        q.ndim != 4
        or k.ndim != 4
        or v.ndim != 4
        or not (q.shape[0] == k.shape[0] and k.shape[:3] == v.shape[:3])
        or not k.shape[1]
        or q.shape[1] % k.shape[1]
    ):
        raise ValueError(
            "Expected q [B, H, N_q, D], k [B, H, N_k, D], v [B, H, N_k, D_v] with equal B and with "
            "equal H or heads of k and v that divide those of q, "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}."
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"Expected one head dim in q and k, got {q.shape[-1]} and {k.shape[-1]}.")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"Expected q, k, v of one dtype on one device, got {q.dtype} on {q.device}, "
            f"{k.dtype} on {k.device} and {v.dtype} on {v.device}. Move them with .to()."
        )
    check_for(plan, q, k)


def check_backend(name: str | None, precision: Precision = "bf16") -> None:
    """Refuses a name that no backend of a precision has, before anything is changed.

    Raises:
        ValueError: an unknown name or precision.
    """
    if name not in (None, *map(_family, backends(precision))):
        raise ValueError(_unknown_backend(str(name), precision))


def _family(backend: Backend) -> str:
    """The name of a backend without a precision."""
    return backend.name.partition(" ")[0]


def _unknown_backend(name: str, precision: Precision = "bf16") -> str:
    """Says that there is no backend of this name for a precision."""
    known = [_family(b) for b in backends(precision)]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    where = "" if precision == "bf16" else f" in {precision}"
    return f"Expected an attention backend among {', '.join(known)}{where}, got {name!r}.{hint}"
