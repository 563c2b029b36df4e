"""Windows and attention over them, one token at a time, from the definitions: a yardstick.

Written from the text of the papers with integers and loops, and sharing nothing with the package
but the layout of the sequence.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dit_sparse.grid import TextSpan, TokenGrid, TokenLayout

Place = tuple[int, int, int]


def axis_keys(
    extent: int,
    window: int,
    stride: int = 1,
    dilation: int = 1,
    causal: bool = False,
    truncated: bool = False,
) -> list[set[int]]:
    """The keys of each position of an axis: generalized neighbourhood attention (2504.16922)."""
    rows = []
    for i in range(extent):
        g, p = i % dilation, i // dilation
        length = len(range(g, extent, dilation))
        group = p // stride
        if causal:
            leader = min(group * stride + stride - 1, length - 1)
            inside = [j for j in range(length) if leader - window < j <= p]
        else:
            leader = min(group * stride + stride // 2, length - 1)
            start = leader - window // 2
            if not truncated:
                while start < 0:
                    start += 1
                while start + window > length:
                    start -= 1
            inside = [j for j in range(length) if start <= j < start + window]
        rows.append({g + dilation * j for j in inside})
    return rows


def product_reads(axes: Sequence[list[set[int]]]) -> Callable[[Place, Place], bool]:
    """Whether a query reads a key: along every axis."""
    return lambda q, k: all(b in rows[a] for rows, a, b in zip(axes, q, k, strict=True))


def sequence_mask(layout: TokenLayout, reads: Callable[[Place, Place], bool]) -> Tensor:
    """bool `[batch, N, N]`: the picture by a rule; text and references read and are read, but
    padding is not read."""
    places: list[Place | None] = []  # None: text or a reference image
    padding: list[list[bool]] = [[] for _ in range(layout.batch or 1)]
    found = False
    for segment in layout.segments:
        if isinstance(segment, TokenGrid) and not found:
            places += itertools.product(*map(range, segment.shape))
            found = True
        else:
            places += [None] * segment.length
        for entry, row in enumerate(padding):
            valid = segment.valid if isinstance(segment, TextSpan) else None
            real = segment.length if valid is None else valid[entry]
            row += [n >= real for n in range(segment.length)]
    seen = [[q is None or k is None or reads(q, k) for k in places] for q in places]
    return torch.tensor(seen) & ~torch.tensor(padding)[:, None]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exp in float64, from `z = scale <q, k>`, one query after the other.

    Args:
        q, k, v: `[B, H, N, D]`, `[B, H_k, N, D]` and `[B, H_k, N, D_v]`; head h of the queries
            reads head h // (H / H_k).
        mask: bool `[1 or B, 1 or H, N, N]`.
    """
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        row = mask[b % mask.shape[0], h % mask.shape[1], i]
        keys = row.nonzero().flatten().tolist()
        if not keys:
            continue
        logits = [scale * float(q[b, h, i] @ k[b, h // group, j]) for j in keys]
        top = max(logits)
        weights = [math.exp(z - top) for z in logits]
        total = sum(weights)
        lse[b, h, i] = top + math.log(total)
        for weight, j in zip(weights, keys, strict=True):
            out[b, h, i] += weight / total * v[b, h // group, j]
    return out, lse
