"""Query blocks on the multiprocessors of a GPU: who runs when, and what an order is worth.

A GPU begins programs in the order of their numbers, each where a place is free first. A program
takes `Cost.program` and `Cost.entry` for every entry of its query blocks. Two programs that share
a multiprocessor are taken for two places of half the speed, to the end: what one gains when the
other is done is left out, and so are caches and clocks.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from dit_sparse.kernels import hopper_persistent
from dit_sparse.kernels.dealt import START
from dit_sparse.kernels.longest_first import BUCKETS
from dit_sparse.kernels.portable import padded
from dit_sparse.plan import BlockPlan

MULTIPROCESSORS = 132  # of an H200, and of an H100 SXM

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Cost:
    """Microseconds of a place.

    Args:
        program: to begin and end a program.
        entry: of every entry.
    """

    program: float
    entry: float

    def of(self, entries: int) -> float:
        return self.program + self.entry * entries


@dataclass(frozen=True)
class Work:
    """The query blocks of a launch.

    Args:
        outer: entries of the blocks around the picture, int64 `[pairs, outer]`.
        inner: of the picture's, `[pairs, inner]`.
        key_blocks: the most entries that a row may have.
        each: picture blocks to a program, where they begin head after head.
        each_queued: the same where the longest begin.
        places: programs that run at the same time.
        queued: whether the library begins with the longest.
    """

    outer: Counts
    inner: Counts
    key_blocks: int
    each: int
    each_queued: int
    places: int
    queued: bool

    @staticmethod
    def of(plan: BlockPlan, heads: int, head_dim: int = 128) -> Work:
        """What the Hopper kernel gets of a plan with heads of 16 bits."""
        masked = plan.predicate is not None
        places = MULTIPROCESSORS * (2 if padded(head_dim) <= 64 and not masked else 1)
        n = plan.q_blocks.n
        batch = plan.offsets.shape[0]
        q = torch.empty(batch, heads, 1, head_dim, dtype=torch.bfloat16, device="meta")
        each, queued = (
            hopper_persistent.blocks_each(
                q, replace(plan, uneven=uneven), masked=masked, places=places
            )
            for uneven in (False, plan.uneven)
        )
        count = (plan.full + plan.partial).expand(batch, heads, n).reshape(-1, n).cpu().numpy()
        inside = np.zeros(n, dtype=bool)
        inside[list(plan.q_blocks.picture or range(n))] = True
        count = count.astype(np.int64)
        rows = count[:, ~inside], count[:, inside]
        return Work(*rows, plan.k_blocks.n, each, queued, places, plan.uneven)

    @property
    def programs(self) -> list[int]:
        """Entries of each program, head after head, what reads everything first."""
        return [*self.outer.flatten().tolist(), *packed(self.inner.flatten().tolist(), self.each)]

    @property
    def queue(self) -> list[int]:
        """Entries of each row, the longest first, in buckets."""
        rows = np.concatenate([self.outer.flatten(), self.inner.flatten()])
        return rows[np.argsort(buckets(rows, self.key_blocks), kind="stable")].tolist()

    @property
    def longest_first(self) -> list[int]:
        """Entries of each program, the longest rows first."""
        rows, alone = self.queue, self.outer.size
        return [*rows[:alone], *packed(rows[alone:], self.each_queued)]

    def chunked(self, programs: Iterable[int], chunks: int) -> list[int]:
        """Programs of which those that are as long as text rows are cut in so many."""
        everything = set(np.unique(self.outer).tolist())
        found: list[int] = []
        for entries in programs:
            parts = chunks if entries in everything else 1
            found += [entries // parts + (n < entries % parts) for n in range(parts)]
        return found


def packed(rows: Sequence[int], each: int) -> list[int]:
    """Entries of programs that take so many neighbours each."""
    return [sum(rows[at : at + each]) for at in range(0, len(rows), each)]


def buckets(entries: Counts, key_blocks: int) -> Counts:
    """The bucket of each row, as `dit_sparse.kernels.order` finds it: 0 reads everything."""

    def size(number: Counts | int) -> Counts:
        return np.asarray(number, np.float32).view(np.int32).astype(np.int64) >> 21

    return np.clip(size(key_blocks) - size(entries), 0, BUCKETS - 1)


def makespan(programs: Iterable[int], places: int, cost: Cost) -> float:
    """Microseconds until the last program ends."""
    free = [0.0] * places
    for entries in programs:
        heapq.heapreplace(free, free[0] + cost.of(entries))
    return max(free)


def ideal(programs: Sequence[int], places: int, cost: Cost) -> float:
    """Microseconds that they take spread evenly over all places."""
    return sum(map(cost.of, programs)) / places


@dataclass(frozen=True)
class Losses:
    """How much longer a launch takes than its work spread evenly, as shares of that.

    Args:
        programs: how many there are.
        ideal: milliseconds of the work of these programs spread evenly.
        plain, longest: head after head; with the longest rows first.
        dealt: of the kernel in Gluon, whose programs, one on each multiprocessor, are dealt rows by
            length; counted in entries.
        chunks, both: `plain` and `longest` with text rows in 2, 4 or 8 chunks, what is best, whose
            results merge for nothing.
    """

    programs: int
    ideal: float
    plain: float
    longest: float
    dealt: float
    chunks: float
    both: float

    @staticmethod
    def of(work: Work, cost: Cost) -> Losses:
        programs, longest = work.programs, work.longest_first
        evenly = ideal(programs, work.places, cost)

        def loss(order: Iterable[int]) -> float:
            return makespan(order, work.places, cost) / evenly - 1.0

        chunks, both = (
            min(loss(work.chunked(order, parts)) for parts in (2, 4, 8))
            for order in (programs, longest)
        )
        entries, rows = Cost(program=START, entry=1.0), work.queue
        # Who has least so far is who would be done first.
        dealt = (
            makespan(rows, MULTIPROCESSORS, entries) / ideal(rows, MULTIPROCESSORS, entries) - 1.0
        )
        plain, first = loss(programs), loss(longest)
        return Losses(len(programs), evenly / 1000, plain, first, dealt, chunks, both)
