"""What attention means, in float64 and as literally as it can be written: the tests' yardstick."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from dit_sparse.plan import BlockPlan

Item = tuple[Tensor, Tensor, float]  # key, value, and how many tokens they stand for


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax over the keys that a bool mask `[.., .., N_q, N_k]` shows; values and LSE."""
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    highest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).min)
    weights = (scores - highest).exp()
    mass = weights.sum(-1, keepdim=True)
    empty = mass == 0
    out = (weights / mass.masked_fill(empty, 1.0)) @ v
    return out, (highest + mass.log()).squeeze(-1)


def planned_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The docstring of `BlockPlan`, one query at a time, in the caller's order."""
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.zeros(q.shape[:-1] + v.shape[-1:], dtype=torch.float64)
    lse = torch.full(q.shape[:-1], -math.inf, dtype=torch.float64)
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        to_caller = _order(plan, h, q.shape[2])
        keys, values = (x[b, h][_order(plan, h, x.shape[2])] for x in (k, v))
        for i, block in enumerate(_blocks(plan.q_blocks.starts)):
            for position in block:
                exact, tail = _items(plan, b, h, i, position, keys, values)
                query = q[b, h, to_caller[position]] * scale
                at = (b, h, to_caller[position])
                out[at], lse[at] = _softmax(query, exact, tail, _covariance(plan, keys, values))
    return out, lse


def _order(plan: BlockPlan, head: int, tokens: int) -> Tensor:
    if plan.order is None:
        return torch.arange(tokens)
    index = plan.order.index.view(-1, tokens)
    return index[head % index.shape[0]]


def _blocks(starts: Tensor) -> list[range]:
    return [range(a, b) for a, b in itertools.pairwise(starts.tolist())]


def _items(
    plan: BlockPlan, b: int, h: int, i: int, position: int, keys: Tensor, values: Tensor
) -> tuple[list[Item], list[Item]]:
    """Everything that the query at a plan position reads: listed entries, and the tail."""
    blocks = _blocks(plan.k_blocks.starts)
    row = (b % plan.offsets.shape[0], h % plan.offsets.shape[1], i)
    first, n_full, n_partial = (int(x[row]) for x in (plan.offsets, plan.full, plan.partial))
    listed, exact = [], []
    for nth in range(n_full + n_partial):
        entry = first + nth
        block = blocks[int(plan.indices[entry])]
        listed.append(block)
        level = 1 if plan.level is None else int(plan.level[entry])
        for start in range(block.start, block.stop, level):
            group = slice(start, min(start + level, block.stop))
            if nth >= n_full:
                box = plan.box
                assert box is not None
                if not box.mask(h, slice(position, position + 1), group).item():
                    continue
            exact.append(_mean(keys, values, group))
    tail = []
    if plan.tail != "none":
        rest = [block for block in blocks if block not in listed]
        tail = [_mean(keys, values, slice(block.start, block.stop)) for block in rest]
    return exact, tail


def _mean(keys: Tensor, values: Tensor, group: slice) -> Item:
    return keys[group].mean(0), values[group].mean(0), float(group.stop - group.start)


def _softmax(
    query: Tensor, exact: list[Item], tail: list[Item], covariance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`sum w v / sum w` with `w = count exp(q k)`, and PISA's global first-order term."""
    items = exact + tail
    if not items:
        return torch.zeros(()), torch.tensor(-math.inf)
    logits = torch.stack([query @ key + math.log(count) for key, _, count in items])
    weights = (logits - logits.max()).exp()
    total = weights.sum()
    out = torch.stack([w * value for w, (_, value, _) in zip(weights, items, strict=True)]).sum(0)
    out = out / total
    if tail and covariance is not None:
        out = out + weights[len(exact) :].sum() / total * (query @ covariance)
    return out, logits.max() + total.log()


def _covariance(plan: BlockPlan, keys: Tensor, values: Tensor) -> Tensor | None:
    """`(1/T) sum_j H_j` with `H_j = sum (k - mean of its block) v^T` (arXiv 2602.01077)."""
    if plan.tail != "first":
        return None
    total = torch.zeros(keys.shape[1], values.shape[1], dtype=torch.float64)
    for block in _blocks(plan.k_blocks.starts):
        centre = keys[block.start : block.stop].mean(0)
        for t in block:
            total += torch.outer(keys[t] - centre, values[t])
    return total / len(keys)
