"""All tensors of a call of the Triton backend, q, k and v in order and measured among them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.backend import AttentionOutput, BlockSummaries
from dit_sparse.kernels import norms, tail
from dit_sparse.kernels.launch import Launch
from dit_sparse.kernels.permute import empty, gather, gather_with_means, permute
from dit_sparse.kernels.results import empty_result
from dit_sparse.plan import BlockPlan


class Room(NamedTuple):
    """All tensors of a call, which has none but these between its launches.

    Args:
        q, k, v: the caller's.
        moved: those that were put into plan order, as one tensor; `None` if none were.
        ordered: q, k and v as the kernels get them.
        result: what the kernels write.
        lengths: of the queries and of the longest key, if kernels subtract a bound.
        means: of the blocks of k and v, if a tail of them is to follow.
        centres: those of k in fp32, if its slope is to follow too.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    moved: Tensor | None
    ordered: tuple[Tensor, Tensor, Tensor]
    result: AttentionOutput
    lengths: tuple[Tensor, Tensor] | None
    means: Tensor | None = None
    centres: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        moved = () if self.moved is None else (self.moved,)
        means = () if self.means is None else (self.means,)
        centres = () if self.centres is None else (self.centres,)
        return [
            *(self.q, self.k, self.v, *moved, *self.ordered, *self.result),
            *(*(self.lengths or ()), *means, *centres),
        ]


def room_for(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    moved: int,
    bounded: bool,
    means: int = 0,
    sloped: bool = False,
) -> Room:
    """Makes room for a call.

    Args:
        q, k, v: the caller's.
        moved: how many of them, the last ones, are put into plan order.
        bounded: whether lengths are needed.
        means: how many blocks of k and v have means; 0 if none are needed.
        sloped: whether a slope is to follow them.
    """
    result = empty_result(q, v.shape[-1])
    lengths = norms.empty(q) if bounded else None
    of_blocks = centres = None
    if means:
        shape = (*k.shape[:2], means, k.shape[3])
        of_blocks = k.new_empty(2, *shape)
        centres = k.new_empty(shape, dtype=torch.float32) if sloped else None
    if not moved:
        return Room(q, k, v, None, (q, k, v), result, lengths, of_blocks, centres)
    room = empty((q, k, v)[-moved:])
    of_queries, of_keys, of_values = (*(q,)[: 3 - moved], *room.unbind())
    ordered = (of_queries, of_keys, of_values)
    return Room(q, k, v, room, ordered, result, lengths, of_blocks, centres)


def in_order(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    queries: bool,
    bounded: bool,
    means: bool = False,
    summaries: BlockSummaries | None = None,
) -> tuple[Room, list[Launch]]:
    """Room for a call, with q, k and v in plan order and lengths measured.

    Args:
        queries: put q into order too; the portable kernel gathers queries itself.
        bounded: measure lengths.
        means: make those of the blocks of k and v, for a tail; queries are then put in order.
        summaries: what is known of q, k and v, which are in order then; nothing is launched.
    """
    if summaries is not None:
        return _summarised(room_for(q, k, v, 0, False), plan, summaries, bounded, means), []
    if means:
        moved = 0 if plan.order is None else 3
        room = room_for(q, k, v, moved, bounded, plan.k_blocks.n, tail.has_slope(plan))
        assert room.means is not None
        made = gather_with_means(
            q, k, v, plan, room.means, out=room.moved, lengths=room.lengths, centres=room.centres
        )
        return room, [made]
    if plan.order is None:
        room = room_for(q, k, v, 0, bounded)
        if room.lengths is None:
            return room, []
        return room, [norms.measure(q, k, room.lengths)]
    given = (q, k, v) if queries else (k, v)
    if len({t.shape for t in given}) == 1:
        room = room_for(q, k, v, len(given), bounded)
        assert room.moved is not None
        return room, [gather(given, plan.order, room.moved, room.lengths)]
    *first, k, v = permute(given, plan.order)
    room = room_for(q, k, v, 0, bounded)
    room = room._replace(ordered=(first[0] if first else q, k, v))
    if room.lengths is not None:
        norms.measure(*room.ordered[:2], room.lengths)
    return room, []


def _summarised(
    room: Room, plan: BlockPlan, summaries: BlockSummaries, bounded: bool, means: bool
) -> Room:
    if bounded:
        room = room._replace(lengths=(summaries.lengths, summaries.longest.amax(-1)))
    if means:
        centres = summaries.keys if tail.has_slope(plan) else None
        room = room._replace(means=summaries.means, centres=centres)
    return room
