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
    scale = (q.shape[-1] ** -0.5 if scale is None else scale) * plan.scale
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
                slopes = _slopes(plan, b, tail, keys, values)
                out[at], lse[at] = _softmax(query, exact, [item for _, item in tail], slopes)
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
) -> tuple[list[Item], list[tuple[range, Item]]]:
    """Everything that the query at a plan position reads: listed entries, and the tail."""
    blocks = _blocks(plan.k_blocks.starts)
    row = (b % plan.offsets.shape[0], h % plan.offsets.shape[1], i)
    first, n_full, n_partial = (int(x[row]) for x in (plan.offsets, plan.full, plan.partial))
    factors = [1] * (n_full + n_partial)
    if plan.pools is not None:
        for factor, count in zip(plan.pools.factors, plan.pools.counts[row].tolist(), strict=True):
            factors += [factor] * count
    listed, exact = [], []
    for nth, level in enumerate(factors):
        block = blocks[int(plan.indices[first + nth])]
        listed.append(block)
        for start in range(block.start, block.stop, level):
            group = slice(start, min(start + level, block.stop))
            if n_full <= nth < n_full + n_partial:
                if plan.words is not None:
                    word, bit = divmod(start - block.start, 32)
                    seen = bool(int(plan.words[first + nth, word]) >> bit & 1)
                else:
                    box = plan.box
                    assert box is not None
                    seen = bool(box.mask(h, slice(position, position + 1), group))
                if not seen:
                    continue
            key, value, count = _mean(keys, values, group)
            if plan.bias is not None and nth < n_full + n_partial:
                if plan.bias[first + nth] == -math.inf:
                    continue
                count *= math.exp(plan.bias[first + nth])
            exact.append((key, value, count))
    tail = []
    if plan.tail != "none":
        rest = [block for block in _open(plan, b, blocks) if block not in listed]
        tail = [(block, _mean(keys, values, slice(block.start, block.stop))) for block in rest]
    return exact, tail


def _open(plan: BlockPlan, b: int, blocks: list[range]) -> list[range]:
    """The blocks that are not hidden from a batch entry."""
    if plan.hidden is None:
        return blocks
    hidden = plan.hidden[b % plan.hidden.shape[0]].tolist()
    return [block for block, unseen in zip(blocks, hidden, strict=True) if not unseen]


def _mean(keys: Tensor, values: Tensor, group: slice) -> Item:
    return keys[group].mean(0), values[group].mean(0), float(group.stop - group.start)


def _softmax(
    query: Tensor, exact: list[Item], tail: list[Item], slopes: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """`sum w v / sum w` with `w = count exp(q k)`; in the tail v has a first-order term."""
    items = exact + tail
    if not items:
        return torch.zeros(()), torch.tensor(-math.inf)
    logits = torch.stack([query @ key + math.log(count) for key, _, count in items])
    weights = (logits - logits.max()).exp()
    total = weights.sum()
    values = [value for _, value, _ in items]
    for nth, slope in enumerate(slopes, start=len(exact)):
        values[nth] = values[nth] + query @ slope
    out = torch.stack([w * value for w, value in zip(weights, values, strict=True)]).sum(0)
    return out / total, logits.max() + total.log()


def _slopes(
    plan: BlockPlan, b: int, tail: list[tuple[range, Item]], keys: Tensor, values: Tensor
) -> list[Tensor]:
    """Of each tail block, `H_j` per token; PISA's is that of all blocks (arXiv 2602.01077)."""
    if plan.tail == "block":
        return [_covariance(keys, values, block) / len(block) for block, _ in tail]
    if plan.tail == "first" and tail:
        blocks = _open(plan, b, _blocks(plan.k_blocks.starts))
        total = sum(_covariance(keys, values, block) for block in blocks)
        return [total / sum(map(len, blocks))] * len(tail)
    return []


def _covariance(keys: Tensor, values: Tensor, block: range) -> Tensor:
    """`H_j = sum (k - mean of its block) v^T`, token by token."""
    centre = keys[block.start : block.stop].mean(0)
    return sum(torch.outer(keys[t] - centre, values[t]) for t in block)
