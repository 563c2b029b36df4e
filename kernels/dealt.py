"""Which query blocks the programs of a persistent launch take, where some take much longer.

As many for each would leave those with the long ones running alone. Blocks of text read everything:
a program that takes one misses as many others as it is worth. Where lists differ much in length,
each next one, the longest first, goes to the program that has least so far. A launch deals them so,
once for a plan of many calls, with text or masks too; a plan of one call is not worth it, and its
programs take from the longest on in turns whose direction changes.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dit_sparse.kernels._deal import _deal_fwd
from dit_sparse.kernels.longest_first import queue_of
from dit_sparse.plan import BlockPlan

#: Turns of which programs read the tile before the last one is over.
AHEAD = 3
#: Entries that take as long as starting and ending a query block.
START = 2
#: Of the launch that deals.
WARPS = 8
_PROGRAMS = 256  # that the launch tells apart
_SHORT = 32  # turns that a program may have beyond twice the mean


class Deal(NamedTuple):
    """Tiles `(batch, head, row)`, counted with the row last, for every program.

    Args:
        tiles: int32 `[turn, program]`, of at least `AHEAD` turns more than any program has. Behind
            those of a program stand numbers of any tiles.
        turns: int32 `[program]`, how many it takes, at least one.
    """

    tiles: Tensor
    turns: Tensor

    def on(self, device: torch.device) -> Deal:
        return Deal(self.tiles.to(device), self.turns.to(device))


def dealt(plan: BlockPlan, batch: int, heads: int, programs: int) -> Deal | None:
    """Who takes which query blocks; `None` where taking them in turns is even.

    Made once for a plan. Nothing waits for the device but, the first time for a shape of which
    lengths are not looked at, a copy to it.

    Args:
        programs: no more than tiles.
    """
    blocks = plan.q_blocks.n
    picture = plan.q_blocks.picture or range(blocks)
    text = len(picture) < blocks
    if not (plan.uneven or text or (plan.lasting and plan.masked)):
        return None
    by_length = plan.lasting and programs <= _PROGRAMS
    if not (plan.uneven or by_length):
        worth = _worth(plan, len(picture))
        return _deal(batch * heads, blocks, picture, worth, programs, plan.device, of_queue=False)
    known: dict[tuple[int, int, int], Deal] = vars(plan).setdefault("_dealt", {})
    key = (batch, heads, programs)
    if key not in known:
        known[key] = (_by_length if by_length else _by_place)(plan, batch, heads, programs)
    return known[key]


def _by_length(plan: BlockPlan, batch: int, heads: int, programs: int) -> Deal:
    """Tiles of a queue by their entries: each to the program that has least, among equals to the
    first of them."""
    queue = queue_of(plan, batch, heads)
    # Entries masked by disks are left to another launch.
    read = plan.full if plan.disk is not None else plan.full + plan.partial
    entries = read.expand(batch, heads, -1).flatten().index_select(0, queue)
    most = _most_turns(len(queue), programs)
    tiles = queue.new_zeros(most + AHEAD, programs)
    turns = queue.new_empty(programs)
    _deal_fwd[(1,)](
        queue, entries, tiles, turns, len(queue), programs, most,
        START=START, WIDTH=max(triton.next_power_of_2(programs), 2), num_warps=WARPS,
    )  # fmt: skip
    return Deal(tiles, turns)


def _most_turns(tiles: int, programs: int) -> int:
    """Turns after which a program takes no more, since the table ends somewhere.

    While there are tiles left some program takes: all of them have room for twice as many. One with
    more than that has lists of half the mean at most.
    """
    return min(2 * -(-tiles // programs) + _SHORT, tiles)


def _by_place(plan: BlockPlan, batch: int, heads: int, programs: int) -> Deal:
    """Tiles of a queue by where they stand in it: first those around the picture."""
    queue = queue_of(plan, batch, heads)
    blocks = plan.q_blocks.n
    picture = plan.q_blocks.picture or range(blocks)
    worth = _worth(plan, len(picture))
    places, turns = _deal(
        batch * heads, blocks, picture, worth, programs, plan.device, of_queue=True
    )
    return Deal(queue.index_select(0, places.flatten()).view_as(places), turns)


def _worth(plan: BlockPlan, inner: int) -> int:
    """Query blocks of the picture that take as long as one around it, without waiting for lists.

    A plan that leaves room in its lists has shorter ones than this counts: then it is too little,
    which is only less even.
    """
    blocks, keys = plan.q_blocks.n, plan.k_blocks.n
    if inner == blocks:
        return 1
    lists = plan.offsets.numel() // blocks
    entries = plan.indices.numel() - lists * (blocks - inner) * keys
    return max(round(keys / max(entries / (lists * inner), 1.0)), 1)


@lru_cache(maxsize=64)
def _deal(
    pairs: int,
    blocks: int,
    picture: range,
    worth: int,
    programs: int,
    device: torch.device,
    *,
    of_queue: bool,
) -> Deal:
    """Tiles of `pairs` of batch entry and head, or places of a queue, whose first ones are those
    around the picture then."""
    outer = [block for block in range(blocks) if block not in picture]
    around = pairs * len(outer)
    deal = _table(_places([worth] * around + [1] * (pairs * blocks - around), programs))
    if not of_queue:
        tile = torch.arange(pairs * blocks, dtype=torch.int32).view(pairs, blocks)
        order = torch.cat([tile[:, outer].flatten(), tile[:, list(picture)].flatten()])
        deal = deal._replace(tiles=order[deal.tiles])
    return deal.on(device)


def _places(worths: Sequence[int], programs: int) -> list[list[int]]:
    """Each place goes to the program that has least so far."""
    waiting = [(0, program, program) for program in range(programs)]
    found: list[list[int]] = [[] for _ in waiting]
    for place, worth in enumerate(worths):
        load, _, program = waiting[0]
        found[program].append(place)
        load += worth
        heapq.heapreplace(waiting, (load, -program if load % 2 else program, program))
    return found


def _table(places: Sequence[Sequence[int]]) -> Deal:
    """Of the places of every program."""
    turns = torch.tensor([len(one) for one in places], dtype=torch.int32)
    rows = int(turns.max()) + AHEAD
    table = torch.tensor([[*one, *[0] * (rows - len(one))] for one in places], dtype=torch.int32)
    return Deal(table.T.contiguous(), turns)
