"""Which query blocks the programs of a persistent launch take, where some take much longer.

As many for each would leave those with the long ones running alone. Blocks of text read everything:
a program that takes one misses as many others as it is worth. Where lists differ much in length,
each next one, the longest first, goes to the program that has least so far; if the host does not
know how long they are, programs take from the longest on in turns whose direction changes.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.kernels.longest_first import longest_first
from dit_sparse.plan import BlockPlan

#: Turns of which programs read the tile before the last one is over.
AHEAD = 3
_START = 2  # entries that take as long as starting and ending a query block


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

    Made once for a plan, waiting for the device if the plan is uneven and `counted`; otherwise,
    the first time for a shape, for a copy to the device.

    Args:
        programs: no more than tiles.
    """
    blocks = plan.q_blocks.n
    picture = plan.q_blocks.picture or range(blocks)
    queue = longest_first(plan, batch, heads)
    if queue is None and len(picture) == blocks:
        return None
    if queue is None:
        worth = _worth(plan, len(picture))
        return _deal(batch * heads, blocks, picture, worth, programs, plan.device, of_queue=False)
    known: dict[tuple[int, int, int], Deal] = vars(plan).setdefault("_dealt", {})
    key = (batch, heads, programs)
    if key not in known:
        waits = plan.counted and not _capturing(plan.device)
        deal = _by_length if waits else _by_place
        known[key] = deal(plan, queue, batch, heads, programs)
    return known[key]


def _by_length(plan: BlockPlan, queue: Tensor, batch: int, heads: int, programs: int) -> Deal:
    """Tiles of a queue by their entries, which the host reads."""
    tiles = queue.cpu()
    count = (plan.full + plan.partial).cpu().expand(batch, heads, -1).flatten()[tiles]
    places, turns = _table(_places((count + _START).tolist(), programs))
    return Deal(tiles[places], turns).on(plan.device)


def _by_place(plan: BlockPlan, queue: Tensor, batch: int, heads: int, programs: int) -> Deal:
    """Tiles of a queue by where they stand in it: first those around the picture."""
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


def _capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: nothing may be waited for."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
