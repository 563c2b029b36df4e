"""What quantised attention computes, in PyTorch on any device: the meaning of a precision.

It rounds what the 8-bit kernels round, and computes in fp32: a yardstick for them and a means to
study quality, not a fast path. For INT4 there is no kernel, since no GPU that Triton knows
multiplies 4-bit integers faster than 8-bit ones: its emulation says what it would cost in quality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from dit_sparse.backend import AttentionOutput
from dit_sparse.kernels.reference import BACKEND, Lists, groups
from dit_sparse.plan import BlockPlan, Blocks

Rounding = Literal["fp8", "int8", "int4"]

E4M3_MAX = 448.0
#: No row of queries or keys in e4m3 is longer: the kernel adds their products in float16.
LONGEST = 224.0
_INTEGERS = {"int8": 127, "int4": 7}
# Powers of two with straight lines between them, of steps of 1/32: the greatest weight is
# 2**8 * 1.75, all that e4m3 holds, and lines are above the exponential by 2**0.0565 in the mean.
_TOP, _TICKS, _ABOVE = 8.75, 32, 0.0565
_LEAST = -15.0  # of the exponents; less is 0


@dataclass(frozen=True)
class EmulatedBackend:
    """Attention with rounded operands for exact entries; pooled ones and the tail are not rounded.

    Args:
        precision: `"fp8"`: queries, keys, weights and values in e4m3, and lines for the exponential
            (the kernel has the exponential itself for masked entries); `"int8"` and `"int4"`:
            queries and keys in integers, weights and values as they are. Queries and keys have a
            step for each block, values one for each channel of a head.
        smooth: subtract the mean key from all keys, which alters no weight (arXiv 2410.02367),
            and the mean value from all values in e4m3. Hidden keys have no part in means and steps.
    """

    precision: Rounding
    smooth: bool = True
    reorders: bool = False

    def __post_init__(self) -> None:
        if self.precision not in get_args(Rounding):
            raise ValueError(
                f"Expected a precision among {', '.join(get_args(Rounding))}, "
                f"got {self.precision!r}."
            )

    @property
    def name(self) -> str:
        return f"reference {self.precision}"

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> str | None:
        if plan.coarse is not None:
            return f"expected a plan without coarse keys in {self.precision}, got {plan}."
        return None

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
    ) -> AttentionOutput:
        exact = self._exact(q.float(), k.float(), v.float(), plan, scale)
        if plan.pools is not None or plan.tail != "none":
            exact = _with_rest(exact, q.float(), k.float(), v.float(), plan, scale)
        return AttentionOutput(exact.out.to(q.dtype), exact.lse)

    def _exact(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
    ) -> AttentionOutput:
        """fp32, of the exact entries."""
        out = torch.zeros(q.shape[:-1] + v.shape[-1:], device=q.device)
        lse = torch.full(q.shape[:-1], -torch.inf, device=q.device)
        k, v = (_without_hidden(x, plan) for x in (k, v))
        k_centre, v_centre = (_mean(x, plan) * self.smooth for x in (k, v))
        shift = scale * (q * k_centre).sum(-1)
        q = round_blocks(q, plan.q_blocks, self.precision)
        k = round_blocks(k - k_centre, plan.k_blocks, self.precision)
        if self.precision == "fp8":
            v = round_channels(_without_hidden(v - v_centre, plan)) + v_centre
        lists = Lists(plan)
        for batch, plan_batch in groups(q.shape[0], plan.batch):
            for heads, plan_head in groups(q.shape[1], lists.heads):
                for block, rows in enumerate(lists.rows):
                    picked = lists.pick(plan_batch, plan_head, block)
                    if not len(picked.keys):
                        continue
                    at = (batch, heads, rows)
                    scores = scale * q[at] @ k[batch, heads][..., picked.keys, :].mT
                    if picked.bias is not None:
                        scores = scores + picked.bias
                    if picked.mask is not None:
                        scores = scores.masked_fill(~picked.mask, -torch.inf)
                    weights, mass = self._weights(scores)
                    centre = v_centre[batch, heads]
                    values = weights @ (v[batch, heads][..., picked.keys, :] - centre)
                    seen = (mass > -torch.inf)[..., None]
                    out[at] = values + centre * seen
                    lse[at] = mass + shift[at]
        return AttentionOutput(out, lse)

    def _weights(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax, in fp8 of rounded weights over the sum of unrounded ones, and the LSE."""
        if self.precision != "fp8":
            mass = scores.logsumexp(-1)
            seen = mass.masked_fill(mass == -torch.inf, 0.0)  # no key: weights of 0, not NaN
            return (scores - seen[..., None]).exp(), mass
        top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
        powers = _lines((scores - top) / math.log(2) + _TOP)
        total = powers.sum(-1, keepdim=True)
        mass = top + total.log() - (_TOP + _ABOVE) * math.log(2)
        return _e4m3(powers) / total.clamp_min(2**_LEAST), mass[..., 0]


def _lines(exponents: Tensor) -> Tensor:
    """Powers of two, between whole ones by straight lines."""
    ticks = (exponents.clamp_min(2 * _LEAST) * _TICKS).round() / _TICKS
    whole = ticks.floor()
    return torch.where(ticks < _LEAST, 0.0, whole.exp2() * (1 + ticks - whole))


def _without_hidden(x: Tensor, plan: BlockPlan) -> Tensor:
    """Keys or values `[B, H, N, D]` in plan order, 0 where nothing reads them."""
    if plan.hidden is None:
        return x
    return x.masked_fill(plan.hidden[:, None, plan.k_blocks.of_token, None], 0.0)


def _mean(x: Tensor, plan: BlockPlan) -> Tensor:
    """Of the keys or values that may be read; those that may not are 0."""
    if plan.hidden is None:
        return x.mean(2, keepdim=True)
    count = (~plan.hidden[:, plan.k_blocks.of_token]).sum(1).clamp_min(1)
    return x.sum(2, keepdim=True) / count[:, None, None, None]


def _with_rest(
    exact: AttentionOutput, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
) -> AttentionOutput:
    """Adds what the plan reads as means: all it reads, less its exact part, both unrounded."""
    everything = BACKEND.run(q, k, v, plan, scale)
    listed = BACKEND.run(q, k, v, replace(plan, pools=None, tail="none"), scale)
    share = (listed.lse - everything.lse).exp().nan_to_num(0.0)  # rows that read nothing: 0
    rest = everything.out - listed.out * share[..., None]
    lse = torch.logaddexp(exact.lse, everything.lse + (1 - share).clamp_min(0.0).log())
    of_exact, of_rest = ((x - lse).exp().nan_to_num(0.0) for x in (exact.lse, everything.lse))
    return AttentionOutput(exact.out * of_exact[..., None] + rest * of_rest[..., None], lse)


def round_blocks(x: Tensor, blocks: Blocks, precision: Rounding) -> Tensor:
    """`x` `[B, H, N, D]` rounded with one step for each block: its largest magnitude over the
    largest integer, and in e4m3 the length of its longest row over `LONGEST`."""
    of_block = x.new_zeros(*x.shape[:2], blocks.n)
    index = blocks.of_token.expand(*x.shape[:2], -1)
    reaches = x.norm(dim=-1) if precision == "fp8" else x.abs().amax(-1)
    reach = of_block.scatter_reduce(2, index, reaches, "amax").clamp_min(1e-12)
    largest = _INTEGERS.get(precision, LONGEST)
    step = (reach / largest).gather(2, index)[..., None]
    if precision == "fp8":
        return _e4m3(x / step) * step
    return (x / step).round() * step


def round_channels(v: Tensor) -> Tensor:
    """`v` in e4m3 with a step for each channel of a head."""
    step = v.abs().amax(2, keepdim=True).clamp_min(1e-12) / E4M3_MAX
    return _e4m3(v / step) * step


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
