"""Element masks as one more matrix product, for kernels in which a comparison takes too long.

Along an axis of its box a query is told apart by the ends of its window, and a block of queries has
few such *classes*: one per place of its tile, fewer under a stride. A query is a row with a one in
the column of its class on every axis, and a key is a row with a large negative number in the
columns of the classes that it is hidden from. Their product, added to the scores, is exactly 0
where the key is visible, since every term is, and far below any score where it is not.

The rows of a block of keys depend only on where it lies relative to the block of queries, so that a
plan needs few different ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from dit_sparse.plan import BlockPlan, Blocks

#: Columns of the rows, one of them for keys that a short block lacks: a product's depth in 8 bits.
COLUMNS = 32
#: What hides a key is minus the product of two of these, which e5m2 holds exactly.
LARGE = 2.0**15
#: Between hidden and real scores, before their scale: products of q and k must not reach it.
FLOOR = -0.5 * LARGE**2

_MOST_PATTERNS = 8192  # of 4 KiB: what stays in L2 beside keys and values
_MOST_COMPARED = 2**28  # elements; of plans with few kinds of blocks there are far fewer


@dataclass(frozen=True, eq=False)
class MaskProduct:
    """The rows whose product masks a plan's partial entries and the ends of short blocks.

    Args:
        queries: e5m2 `[T, query block, COLUMNS]`, the different blocks of queries.
        query: int32 `[1 or H, n_q]`, which of them each query block is.
        keys: e5m2 `[P, key block, COLUMNS]`, the different blocks of keys.
        entry: int32 `[E]`, which of them each full or partial entry reads. In every row of the plan
            both kinds ascend together here, so that neighbouring query blocks walk the same keys.
        starts: int32 `[E]`, first key position of each.
        place: int64 `[E]`, where it stands in the plan.
    """

    queries: Tensor
    query: Tensor
    keys: Tensor
    entry: Tensor
    starts: Tensor
    place: Tensor

    @staticmethod
    def of(plan: BlockPlan) -> MaskProduct | None:
        """Made once for a plan, waiting for the device.

        `None` where there is nothing to mask, and where a product cannot do it: disks, lists that
        heads with different boxes share, more classes than columns, too many different blocks.
        """
        if (box := plan.box) is None or box.heads not in (1, plan.offsets.shape[1]):
            return None
        if not bool((plan.partial > 0).any()):
            return None
        axes: list[_Axis] = []
        for field in _fields(box.guard):
            room = COLUMNS - 1 - sum(axis.classes for axis in axes)
            if (axis := _Axis.of(plan, *field, room)) is None:
                return None
            axes.append(axis)
        if not axes:
            return None
        queries, query = _query_rows(axes)
        found = _key_rows(plan, axes)
        return None if found is None else MaskProduct(queries, query.int(), *found)


@dataclass(frozen=True, eq=False)
class _Axis:
    """One axis of the box.

    Args:
        of_query: int64 `[1 or H, n_q, query block]`, class of each query in its block.
        classes: the most that a block has.
        q_kind: int64 `[1 or H, n_q]`, which blocks of queries have equal classes.
        k_kind: int64 `[n_k]`, which blocks of keys stand at equal coordinates.
        pattern: int64 `[q kinds, k kinds]`, number of what is hidden from whom.
        hidden: bool `[patterns, key block, classes]`.
    """

    of_query: Tensor
    classes: int
    q_kind: Tensor
    k_kind: Tensor
    pattern: Tensor
    hidden: Tensor

    @staticmethod
    def of(plan: BlockPlan, shift: int, bits: int, room: int) -> _Axis | None:
        """`None` for more classes than `room`, or too many kinds of blocks."""
        box = plan.box
        assert box is not None

        def field(packed: Tensor, blocks: Blocks) -> Tensor:
            return (packed[..., _tokens(blocks)].long() >> shift) & ((1 << bits) - 1)

        lower, upper = (field(ends, plan.q_blocks) for ends in (box.lower, box.upper))
        of_query, ends = _classes((lower << bits) | upper)
        if (classes := ends.shape[-1]) > room:
            return None
        q_kinds, q_kind = ends.flatten(0, -2).unique(dim=0, return_inverse=True)
        key = torch.stack([field(at, plan.k_blocks) for at in (box.above, box.below)], dim=1)
        k_kinds, k_kind = key.unique(dim=0, return_inverse=True)
        if len(q_kinds) * k_kinds[:, 0].numel() * classes > _MOST_COMPARED:
            return None
        low, high = (q_kinds >> bits)[:, None, None], (q_kinds & ((1 << bits) - 1))[:, None, None]
        above, below = k_kinds.unbind(1)
        hidden = (above[None, :, :, None] < low) | (below[None, :, :, None] > high)
        patterns, pattern = hidden.flatten(0, 1).flatten(1).unique(dim=0, return_inverse=True)
        return _Axis(
            of_query=of_query,
            classes=classes,
            q_kind=q_kind.view(ends.shape[:-1]),
            k_kind=k_kind,
            pattern=pattern.view(hidden.shape[:2]),
            hidden=patterns.unflatten(1, hidden.shape[2:]),
        )


def _fields(guard: int) -> Iterator[tuple[int, int]]:
    """Shift and bits of every field that has any; see `BoxPredicate`."""
    ends = [-1, *(bit for bit in range(32) if guard >> bit & 1)]
    for last, end in itertools.pairwise(ends):
        if end - last > 1:
            yield last + 1, end - last - 1


def _tokens(blocks: Blocks) -> Tensor:
    """int64 `[n, size]`: positions of a block's tokens; the first one stands for missing ones."""
    within = torch.arange(blocks.size, device=blocks.starts.device)
    return blocks.starts[:-1, None] + within * (within < blocks.lengths[:, None])


def _classes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of every value among the different ones of its row, and those, the last one repeated."""
    ordered, at = values.sort(-1)
    rank = F.pad(ordered.diff(dim=-1) != 0, (1, 0)).cumsum(-1)
    classes = int(rank[..., -1].max()) + 1
    different = ordered[..., -1:].repeat(1, 1, classes).scatter(-1, rank, ordered)
    return torch.empty_like(rank).scatter(-1, at, rank), different


def _query_rows(axes: list[_Axis]) -> tuple[Tensor, Tensor]:
    """Different blocks of queries, and the number of each block of the plan."""
    code = torch.zeros_like(axes[0].of_query)
    for axis in axes:
        code = code * COLUMNS + axis.of_query
    codes, number = code.flatten(0, 1).unique(dim=0, return_inverse=True)
    rows = codes.new_zeros(*codes.shape, COLUMNS, dtype=torch.bool)
    rows[..., 0] = True
    first = 1 + sum(axis.classes for axis in axes)
    for axis in reversed(axes):
        first -= axis.classes
        rows.scatter_(-1, (first + codes % COLUMNS)[..., None], True)
        codes = codes // COLUMNS
    return (rows * LARGE).to(torch.float8_e5m2), number.view(code.shape[:2])


def _key_rows(plan: BlockPlan, axes: list[_Axis]) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Different blocks of keys; for each entry the number of the one that it reads, its start, and
    its place in the plan."""
    count = (plan.full + plan.partial).flatten().long()
    row = torch.arange(len(count), device=plan.device).repeat_interleave(count)
    nth = torch.arange(len(row), device=plan.device) - (count.cumsum(0) - count)[row]
    at = plan.offsets.flatten()[row] + nth
    key = plan.indices[at].long()
    key, ascending = (row * plan.k_blocks.n + key).sort()  # rows stay where they are
    block, key = row % plan.q_blocks.n, key % plan.k_blocks.n
    head = row // plan.q_blocks.n % plan.offsets.shape[1]
    number = torch.zeros_like(row)
    for axis in axes:
        q_kind = axis.q_kind[head if len(axis.q_kind) > 1 else 0, block]
        number = number * len(axis.hidden) + axis.pattern[q_kind, axis.k_kind[key]]
    masked = (nth >= plan.full.flatten()[row])[ascending]
    lengths, length = plan.k_blocks.lengths.unique(return_inverse=True)
    number = torch.where(masked, number + 1, 0) * len(lengths) + length[key]
    numbers, found = number.unique(return_inverse=True)
    if len(numbers) > _MOST_PATTERNS:
        return None
    size = plan.k_blocks.size
    within = torch.arange(size, device=plan.device)
    rows = numbers.new_zeros(len(numbers), size, COLUMNS, dtype=torch.bool)
    rows[..., 0] = within >= lengths[numbers % len(lengths), None]
    numbers = numbers // len(lengths)
    masked, numbers = numbers > 0, numbers - 1
    end = 1 + sum(axis.classes for axis in axes)
    for axis in reversed(axes):
        hidden = axis.hidden[numbers % len(axis.hidden)] & masked[:, None, None]
        rows[..., end - axis.classes : end] = hidden
        end -= axis.classes
        numbers = numbers // len(axis.hidden)
    entry, starts = torch.zeros_like(plan.indices), torch.zeros_like(plan.indices)
    entry[at], starts[at] = found.int(), plan.k_blocks.starts[key]
    place = torch.zeros_like(entry, dtype=torch.int64)
    place[at] = at[ascending]
    return (0.0 - rows * LARGE).to(torch.float8_e5m2), entry, starts, place
