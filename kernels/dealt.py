"""Which query blocks the programs of a persistent launch take, where some take much longer.

As many for each would leave those with the long ones running alone. Blocks of text read everything:
a program that takes one misses as many others as it is worth. Queues begin with the longest lists,
and programs take from them in turns whose direction changes.
"""

from __future__ import annotations

import heapq
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.kernels.longest_first import longest_first
from dit_sparse.plan import BlockPlan

#: Turns of which programs read the tile before the last one is over.
AHEAD = 3


class Deal(NamedTuple):
    """Tiles `(batch, head, row)`, counted with the row last, for every program.

    Args:
        tiles: int32 `[turn, program]`, of at least `AHEAD` turns more than any program has. Behind
            those of a program stand numbers of any tiles.
        turns: int32 `[program]`, how many it takes, at least one.
    """

    tiles: Tensor
    turns: Tensor


def dealt(plan: BlockPlan, batch: int, heads: int, programs: int) -> Deal | None:
    """Who takes which query blocks; `None` where taking them in turns is even.

    Waits for nothing, but the first time for a shape for a copy to the device.

    Args:
        programs: no more than tiles.
    """
    blocks = plan.q_blocks.n
    picture = plan.q_blocks.picture or range(blocks)
    queue = longest_first(plan, batch, heads)
    if queue is None and len(picture) == blocks:
        return None
    worth = _worth(plan, len(picture))
    made = (batch * heads, blocks, picture, worth, programs, plan.device)
    if queue is None:
        return _deal(*made, of_queue=False)
    known: dict[tuple[int, int, int], Deal] = vars(plan).setdefault("_dealt", {})
    key = (batch, heads, programs)
    if key not in known:
        places, turns = _deal(*made, of_queue=True)
        tiles = queue.index_select(0, places.flatten()).view_as(places)
        known[key] = Deal(tiles, turns)
    return known[key]


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
    places = _places(pairs * blocks, pairs * len(outer), worth, programs)
    turns = torch.tensor([len(one) for one in places], dtype=torch.int32)
    rows = int(turns.max()) + AHEAD
    table = torch.tensor([one + [0] * (rows - len(one)) for one in places]).T
    if not of_queue:
        tile = torch.arange(pairs * blocks).view(pairs, blocks)
        table = torch.cat([tile[:, outer].flatten(), tile[:, list(picture)].flatten()])[table]
    return Deal(table.int().contiguous().to(device), turns.to(device))


def _places(count: int, outer: int, worth: int, programs: int) -> list[list[int]]:
    """Each place goes to the program that has least so far; the first `outer` count for more."""
    waiting = [(0, program, program) for program in range(programs)]
    found: list[list[int]] = [[] for _ in waiting]
    for place in range(count):
        load, _, program = waiting[0]
        found[program].append(place)
        load += worth if place < outer else 1
        heapq.heapreplace(waiting, (load, -program if load % 2 else program, program))
    return found
