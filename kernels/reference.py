"""The meaning of a plan: small, exact, on any device, in the precision it is asked for.

Every backend is compared with this one, and this one with dense masked attention in float64.
Scores, softmax and sums are fp32 (float64 for float64 inputs); only the result is rounded to the
dtype of the queries. It computes only the listed blocks, so a CPU gains from sparsity too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dit_sparse import words
from dit_sparse.backend import AttentionOutput
from dit_sparse.correction import BlockMeans, block_means, covariance_sum, covariances
from dit_sparse.plan import BlockPlan


@dataclass(frozen=True)
class ReferenceBackend:
    """Runs every valid plan."""

    name: str = "reference"
    reorders: bool = False

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> str | None:
        return None

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
    ) -> AttentionOutput:
        accurate = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = torch.empty(q.shape[:-1] + v.shape[-1:], dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        lists = Lists(plan)
        for batch, plan_batch in groups(q.shape[0], plan.batch):
            for heads, plan_head in groups(q.shape[1], lists.heads):
                qs, ks, vs = (t[batch, heads].to(accurate) for t in (q, k, v))
                tail = _Tail.of(ks, vs, plan, plan_batch)
                for block, rows in enumerate(lists.rows):
                    picked = lists.pick(plan_batch, plan_head, block)
                    values, mass = _row(qs[..., rows, :] * scale, ks, vs, picked, tail)
                    out[batch, heads, rows] = values.to(q.dtype)
                    lse[batch, heads, rows] = mass.float()
        return AttentionOutput(out, lse)


BACKEND = ReferenceBackend()


@dataclass(frozen=True)
class _Picked:
    """What one query block reads: exact keys (with a mask where needed), pooled keys, the rest."""

    keys: Tensor  # int64 positions of exact keys
    mask: Tensor | None  # bool [rows, keys]
    bias: Tensor | None  # [keys], added to scores
    pools: list[tuple[Tensor, int]]  # positions of a pooled block, pool factor
    unlisted: Tensor  # int64 numbers of the blocks that are not listed


class Lists:
    """The plan's lists on the host, one row at a time."""

    def __init__(self, plan: BlockPlan) -> None:
        self.plan = plan
        masks = plan.predicate
        self.heads = max(plan.offsets.shape[1], 1 if masks is None else masks.heads)
        starts = plan.q_blocks.starts.tolist()
        self.rows = [slice(a, b) for a, b in pairwise(starts)]
        k_starts = plan.k_blocks.starts.tolist()
        self._keys = [torch.arange(a, b, device=plan.device) for a, b in pairwise(k_starts)]
        self._offsets, self._full, self._partial, self._indices = (
            t.tolist() for t in (plan.offsets, plan.full, plan.partial, plan.indices)
        )
        self._pools = None if plan.pools is None else plan.pools.counts.tolist()
        self._open = torch.ones(plan.batch, plan.k_blocks.n, dtype=torch.bool)
        if plan.hidden is not None:
            self._open &= ~plan.hidden.cpu()

    def pick(self, batch: int, head: int, block: int) -> _Picked:
        row = (batch % self.plan.offsets.shape[0], head % self.plan.offsets.shape[1], block)
        first, n_full, n_partial = (
            rows[row[0]][row[1]][block] for rows in (self._offsets, self._full, self._partial)
        )
        stop = first + n_full + n_partial
        exact = [self._keys[j] for j in self._indices[first:stop]]
        n_unmasked = sum(map(len, exact[:n_full]))
        keys = torch.cat([*exact, self._keys[0][:0]])
        inside = self._inside(head, block, keys[n_unmasked:], range(first + n_full, stop))
        mask = None
        if inside is not None:
            whole = inside.new_ones(inside.shape[0], n_unmasked)
            mask = torch.cat([whole, inside], dim=1)
        bias = None
        if self.plan.bias is not None:
            lengths = torch.tensor([len(of_block) for of_block in exact], dtype=torch.int64)
            bias = self.plan.bias[first:stop].repeat_interleave(lengths.to(keys.device))
        pools = []
        for factor, count in self._pooled(row):
            pools += [(self._keys[j], factor) for j in self._indices[stop : stop + count]]
            stop += count
        rest = self._open[batch % len(self._open)].clone()
        rest[self._indices[first:stop]] = False
        return _Picked(keys, mask, bias, pools, rest.nonzero().flatten().to(self.plan.device))

    def _inside(self, head: int, block: int, keys: Tensor, entries: range) -> Tensor | None:
        """bool [rows, keys] of the partial entries; `None`: nothing masks them."""
        rows = self.rows[block]
        if self.plan.words is None:
            return self.plan.element_mask(head, rows, keys)
        real = [self._keys[self._indices[entry]] for entry in entries]
        bits = words.bits(self.plan, torch.tensor(entries, dtype=torch.int64, device=keys.device))
        seen = [row[: len(of_block)] for row, of_block in zip(bits, real, strict=True)]
        return torch.cat([*seen, bits.new_ones(0)]).expand(rows.stop - rows.start, -1)

    def _pooled(self, row: tuple[int, int, int]) -> Iterator[tuple[int, int]]:
        """Pool factors and how many entries of each a row has."""
        if self._pools is not None and self.plan.pools is not None:
            batch, head, block = row
            yield from zip(self.plan.pools.factors, self._pools[batch][head][block], strict=True)


@dataclass(frozen=True)
class _Tail:
    """Block means for unlisted blocks and, for the first order, key-value covariances."""

    means: BlockMeans
    bias: Tensor  # [n_k] ln(tokens of the block)
    mean_covariance: Tensor | None  # [..., D, D_v]: per token, over all blocks that are not hidden
    covariances: Tensor | None  # [..., n_k, D, D_v]: per token of each block

    @staticmethod
    def of(k: Tensor, v: Tensor, plan: BlockPlan, batch: int) -> _Tail | None:
        if plan.tail == "none":
            return None
        means = block_means(k, plan.k_blocks), block_means(v, plan.k_blocks)
        lengths = plan.k_blocks.lengths.to(k.dtype)
        seen = torch.ones_like(lengths)
        if plan.hidden is not None:
            seen = seen * ~plan.hidden[batch % plan.hidden.shape[0]]
        mean = each = None
        if plan.tail == "first":
            mean = covariance_sum(k, v, plan.k_blocks, seen) / (lengths * seen).sum()
        elif plan.tail == "block":
            each = covariances(k, v, plan.k_blocks) / lengths[:, None, None]
        return _Tail(BlockMeans(*means), lengths.log(), mean, each)

    def first_order(self, q: Tensor, shares: Tensor, blocks: Tensor) -> Tensor | None:
        """What Taylor's first term adds, for the softmax shares `[..., rows, len(blocks)]`."""
        if self.mean_covariance is not None:
            return shares.sum(-1, keepdim=True) * (q @ self.mean_covariance)
        if self.covariances is None:
            return None
        added = q.new_zeros(*q.shape[:-1], self.covariances.shape[-1])
        for nth, block in enumerate(blocks.tolist()):
            added += shares[..., nth, None] * (q @ self.covariances[..., block, :, :])
        return added


def _row(
    q: Tensor, k: Tensor, v: Tensor, picked: _Picked, tail: _Tail | None
) -> tuple[Tensor, Tensor]:
    """Softmax over everything that one (already scaled) query block reads."""
    keys, values = [k[..., picked.keys, :]], [v[..., picked.keys, :]]
    biases = [q.new_zeros(len(picked.keys)) if picked.bias is None else picked.bias.to(q.dtype)]
    for positions, level in picked.pools:
        keys.append(_group_means(k[..., positions, :], level))
        values.append(_group_means(v[..., positions, :], level))
        counts = [len(group) for group in positions.split(level)]
        biases.append(q.new_tensor(counts).log())
    if tail is not None:
        keys.append(tail.means.keys[..., picked.unlisted, :])
        values.append(tail.means.values[..., picked.unlisted, :])
        biases.append(tail.bias[picked.unlisted])
    scores = q @ torch.cat(keys, -2).transpose(-2, -1) + torch.cat(biases)
    if picked.mask is not None:
        hidden = ~picked.mask
        scores[..., : hidden.shape[1]].masked_fill_(hidden, float("-inf"))
    if scores.shape[-1] == 0:
        return q.new_zeros(*q.shape[:-1], v.shape[-1]), q.new_full(q.shape[:-1], float("-inf"))
    # Dividing by the sum rather than by exp(lse): at scores of 1e4 the latter has few digits left.
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top.clamp_min(torch.finfo(top.dtype).min)).exp()
    mass = weights.sum(-1, keepdim=True)
    weights = weights / mass.clamp_min(torch.finfo(mass.dtype).tiny)
    lse = (top + mass.log())[..., 0]
    out = weights @ torch.cat(values, -2)
    if tail is not None and len(picked.unlisted):
        shares = weights[..., -len(picked.unlisted) :]
        added = tail.first_order(q, shares, picked.unlisted)
        out = out if added is None else out + added
    return out.masked_fill(mass == 0, 0.0), lse  # weights of 0 hide no NaN among the values


def _group_means(x: Tensor, size: int) -> Tensor:
    """Means of consecutive groups of tokens, the last of which may be smaller."""
    rest = x.shape[-2] % size
    whole, short = x.split((x.shape[-2] - rest, rest), dim=-2)
    means = whole.unflatten(-2, (whole.shape[-2] // size, size)).mean(-2)
    return torch.cat([means, short.mean(-2, keepdim=True)], dim=-2) if rest else means


def groups(size: int, lists: int) -> Iterator[tuple[slice, int]]:
    """Entries of a dimension that share lists: all of them, or each its own."""
    if lists == 1:
        yield slice(None), 0
    else:
        yield from ((slice(i, i + 1), i) for i in range(size))
