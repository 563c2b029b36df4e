"""Plans in 8 bits on Hopper: quantise, then the 8-bit kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.backend import AttentionOutput, Precision
from dit_sparse.kernels import hopper, hopper_quantised
from dit_sparse.kernels.block_sparse import device_of, like, unit_stride
from dit_sparse.kernels.permute import permute
from dit_sparse.kernels.portable import padded
from dit_sparse.kernels.quantise import Quantised, quantise
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
            eight = quantise(
                q, k, v, plan, integers=self.precision == "int8", values=self.precision == "fp8"
            )
            if eight.v is None and plan.order is not None:
                v = permute([v], plan.order)[0]
            lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
            result = AttentionOutput(like(q, v.shape[-1]), lse)
            _launch(eight, v, plan, scale, result)
        return result


def _launch(
    eight: Quantised, v: Tensor, plan: BlockPlan, scale: float, result: AttentionOutput
) -> None:
    for partial in (False, True):
        if partial and (plan.box is None or not len(plan.masked_rows)):
            continue
        done = hopper_quantised.launch(eight, v, plan, scale, result, partial=partial)
        if done is None:  # strides that descriptors do not take
            v = v.clone(memory_format=torch.contiguous_format)
            done = hopper_quantised.launch(eight, v, plan, scale, result, partial=partial)
            assert done is not None  # see refuses_values


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
    return None


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
    if plan.pools is not None or plan.tail != "none" or plan.coarse is not None:
        return f"expected a plan of exact entries in 8 bits, got {plan}. Use precision='bf16'."
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
        return None
    return (
        "expected compute capability 9.0 and Triton 3.6 or later in 8 bits, got "
        f"{torch.cuda.get_device_capability(q.device)}. Use precision='bf16'."
    )
