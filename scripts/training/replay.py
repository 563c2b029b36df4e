"""Training examples that are learnt from more than once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.training.buckets import Bucket
from scripts.training.loop import Randomness
from scripts.training.prefetch import Batch

#: Batches of a size that are kept to draw from.
_KEPT = 32


@dataclass
class _Pool:
    """Examples of one size: `filled` batches, the oldest of which is replaced next."""

    tensors: Batch
    filled: int = 0
    drawn: int = 0


class Replay:
    """Draws batches from a pool of examples, a part of which is renewed now and then.

    Composing and encoding a clip takes as long as learning from it, and learning meets it with
    another noise each time. What is drawn depends on what was made before: a resumed run begins
    with other batches than it would have gone on with.

    Args:
        make: makes a batch of examples.
        uses: how often an example is drawn on average; 1 draws none twice.
    """

    def __init__(self, make: Callable[[Bucket, Randomness], Batch], uses: int) -> None:
        if uses < 1:
            raise ValueError(f"Expected examples to be used at least once, got {uses}.")
        self._make = make
        self._uses = uses
        self._pools: dict[Bucket, _Pool] = {}

    def __call__(self, bucket: Bucket, draws: Randomness) -> Batch:
        """A batch; processes that draw the same buckets make new examples in the same steps."""
        if self._uses == 1:
            return self._make(bucket, draws)
        pool = self._pools.get(bucket)
        if pool is None or pool.drawn % self._uses == 0:
            pool = self._renewed(bucket, self._make(bucket, draws))
        pool.drawn += 1
        examples = min(pool.filled, _KEPT) * bucket.batch
        rows = torch.randperm(examples, generator=draws.data)[: bucket.batch]
        rows = rows.to(pool.tensors[0].device)
        return tuple(tensor[rows] for tensor in pool.tensors)

    def _renewed(self, bucket: Bucket, made: Batch) -> _Pool:
        if bucket not in self._pools:
            room = (t.new_empty(_KEPT * len(t), *t.shape[1:]) for t in made)
            self._pools[bucket] = _Pool(tuple(room))
        pool = self._pools[bucket]
        start = pool.filled % _KEPT * bucket.batch
        tensors: list[Tensor] = list(pool.tensors)
        for tensor, new in zip(tensors, made, strict=True):
            tensor[start : start + bucket.batch] = new
        pool.filled += 1
        return pool
