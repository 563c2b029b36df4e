"""Query blocks on the multiprocessors of a GPU: who takes which, and what that is worth.

The kernel in Gluon has a program on every multiprocessor, which takes one query block after the
other; who takes which is settled before (`dit_sparse.kernels.dealt`). A query block takes
`Cost.block` and `Cost.entry` for every entry. Caches and clocks are left out.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dit_sparse.kernels import dealt
from dit_sparse.kernels.longest_first import BUCKETS
from dit_sparse.plan import BlockPlan

MULTIPROCESSORS = 132  # of an H200, and of an H100 SXM

#: Block after block; those around the picture or the longest first, by worths; the longest first,
#: by entries.
Way: TypeAlias = Literal["in turns", "by place", "by length"]
WAYS: tuple[Way, ...] = ("in turns", "by place", "by length")

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Cost:
    """Microseconds of a program.

    Args:
        block: to begin and end a query block.
        entry: of every entry.
    """

    block: float
    entry: float

    def of(self, rows: Counts) -> float:
        return self.block * rows.size + self.entry * int(rows.sum())


#: What the library takes query blocks for.
LIBRARY = Cost(block=dealt.START, entry=1.0)


@dataclass(frozen=True)
class Work:
    """The query blocks of a launch.

    Args:
        rows: entries of each query block, int64 `[pairs, blocks]`.
        inside: which of them are the picture's, bool `[blocks]`; the others read everything.
        key_blocks: the most entries that a row may have.
        worth: query blocks of the picture that take as long as one around it.
        queued: whether lists differ much in length.
        lasting: whether the plan is of many calls.
        masked: whether it masks entries.
    """

    rows: Counts
    inside: NDArray[np.bool_]
    key_blocks: int
    worth: int
    queued: bool
    lasting: bool
    masked: bool

    @staticmethod
    def of(plan: BlockPlan, heads: int) -> Work:
        """What the kernel gets of a plan."""
        n, batch = plan.q_blocks.n, plan.offsets.shape[0]
        rows = plan.count.expand(batch, heads, n).reshape(-1, n).cpu().numpy().astype(np.int64)
        inside = np.zeros(n, dtype=bool)
        inside[list(plan.q_blocks.picture or range(n))] = True
        worth = dealt._worth(plan, int(inside.sum()))
        return Work(rows, inside, plan.k_blocks.n, worth, plan.uneven, plan.lasting, plan.masked)

    @property
    def way(self) -> Way:
        """How the library shares them out."""
        if not (self.queued or (self.lasting and self.masked) or not self.inside.all()):
            return "in turns"
        return "by length" if self.lasting else "by place"

    @property
    def queue(self) -> Counts:
        """Entries of each row as they are dealt: the longest first, in buckets, where the library
        does so; otherwise those around the picture."""
        parts = self.rows[:, ~self.inside].flatten(), self.rows[:, self.inside].flatten()
        rows = np.concatenate(parts)
        return self._sorted(rows) if self.queued else rows

    def _sorted(self, rows: Counts) -> Counts:
        return rows[np.argsort(buckets(rows, self.key_blocks), kind="stable")]

    def shares(self, way: Way) -> list[Counts]:
        """Entries of the rows that each program takes."""
        programs = min(self.rows.size, MULTIPROCESSORS)
        if way == "in turns":
            return [self.rows.flatten()[program::programs] for program in range(programs)]
        if way == "by length":
            queue = self._sorted(self.queue)
            return [queue[places] for places in _by_length(queue.tolist(), programs)]
        around = len(self.rows) * int((~self.inside).sum())
        worths = [self.worth] * around + [1] * (self.rows.size - around)
        return [self.queue[places] for places in dealt._places(worths, programs)]

    def longest(self, way: Way, cost: Cost) -> Counts:
        """Of the program that ends last."""
        return max(self.shares(way), key=cost.of)

    def chunked(self, chunks: int) -> Work:
        """With each row around the picture cut in so many."""
        outer = self.rows[:, ~self.inside]
        parts = [outer // chunks + (number < outer % chunks) for number in range(chunks)]
        rows = np.concatenate([*parts, self.rows[:, self.inside]], axis=1)
        inside = np.arange(rows.shape[1]) >= chunks * outer.shape[1]
        return replace(self, rows=rows, inside=inside, worth=max(round(self.worth / chunks), 1))


def _by_length(worths: Sequence[int], programs: int) -> Iterator[list[int]]:
    """Places of each program: every next one to who has least, as `dealt._by_length` deals."""
    found: list[list[int]] = [[] for _ in range(programs)]
    most, waiting = dealt._most_turns(len(worths), programs), [(0, n) for n in range(programs)]
    for place, entries in enumerate(worths):
        load, program = waiting[0]
        found[program].append(place)
        if len(found[program]) < most:
            heapq.heapreplace(waiting, (load + entries + dealt.START, program))
        else:
            heapq.heappop(waiting)
    return iter(found)


def buckets(entries: Counts, key_blocks: int) -> Counts:
    """The bucket of each row, as `kernels.longest_first` finds it: 0 reads everything."""

    def size(number: Counts | int) -> Counts:
        return np.asarray(number, np.float32).view(np.int32).astype(np.int64) >> 21

    return np.clip(size(key_blocks) - size(entries), 0, BUCKETS - 1)


@dataclass(frozen=True)
class Losses:
    """How much longer a launch takes than its work spread evenly, as shares of that.

    Args:
        blocks: how many query blocks there are.
        ideal: milliseconds of the work spread evenly over all multiprocessors.
        ways: of each way to share it out.
        chunks: of the library's way, with text rows in 2, 4 or 8 chunks, what is best, whose
            results merge for nothing; in comparison with the work of whole rows.
    """

    blocks: int
    ideal: float
    ways: dict[Way, float]
    chunks: float

    @staticmethod
    def of(work: Work, cost: Cost) -> Losses:
        evenly = cost.of(work.rows) / MULTIPROCESSORS

        def loss(work: Work, way: Way) -> float:
            return cost.of(work.longest(way, cost)) / evenly - 1.0

        chunks = min(loss(work.chunked(parts), work.way) for parts in (2, 4, 8))
        ways = {way: loss(work, way) for way in WAYS}
        return Losses(work.rows.size, evenly / 1000, ways, chunks)
