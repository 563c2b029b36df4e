"""What to compute: which key blocks every query block reads, and how.

A plan speaks of positions in *plan order*: the caller's tokens after `plan.order`. Tokens are cut
into blocks of at most `Blocks.size` tokens; blocks may be shorter anywhere, so that a block never
straddles a tile, a text span or the end of the sequence, and nothing has to divide anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from dit_sparse import words
from dit_sparse.density import keys_read
from dit_sparse.grid import Permutation
from dit_sparse.list_lengths import check_entries, uneven
from dit_sparse.mask_product import MaskProduct
from dit_sparse.pools import Pools as Pools
from dit_sparse.pools import Tail as Tail
from dit_sparse.predicate import BoxPredicate, DiskPredicate, Predicate, make_contiguous


@dataclass(frozen=True, eq=False)
class Blocks:
    """A cut of `0..N` into consecutive blocks.

    Args:
        starts: int32 `[n + 1]`, first position of each block; the last element is N.
        size: the most tokens a block holds; kernels compute whole tiles of this size.
        picture: numbers of the blocks of the picture, where others stand around them. Those read
            everything, so kernels may begin with them; no result depends on it.
    """

    starts: Tensor
    size: int
    picture: range | None = None

    @classmethod
    def uniform(cls, total: int, size: int, device: torch.device | str | None = None) -> Blocks:
        """Blocks of `size` tokens, the last one shorter when `size` does not divide `total`."""
        return cls.of_runs([total], size, device)

    @classmethod
    def of_runs(
        cls, runs: Sequence[int], size: int, device: torch.device | str | None = None
    ) -> Blocks:
        """Cuts every run (a tile, a text span) into blocks of `size`; no block spans two runs."""
        if size < 1 or any(run < 0 for run in runs):
            raise ValueError(
                f"Expected runs of at least 0 tokens and blocks of at least 1, got runs {runs} "
                f"and blocks of {size}."
            )
        starts = [0]
        for run in runs:
            stop = starts[-1] + run
            starts.extend(range(starts[-1] + size, stop, size))
            if run:
                starts.append(stop)
        return cls(torch.tensor(starts, dtype=torch.int32, device=device), size)

    @property
    def n(self) -> int:
        return self.starts.numel() - 1

    @cached_property
    def total(self) -> int:
        """Number of tokens."""
        return int(self.starts[-1])

    @cached_property
    def lengths(self) -> Tensor:
        """int32 `[n]`, tokens in each block."""
        return self.starts.diff()

    @cached_property
    def ragged(self) -> bool:
        """Whether any block is shorter than `size`."""
        return bool((self.lengths < self.size).any())

    @cached_property
    def of_token(self) -> Tensor:
        """int64 `[N]`, the block that each position belongs to."""
        ids = torch.arange(self.n, device=self.starts.device)
        return ids.repeat_interleave(self.lengths, output_size=self.total)

    def to(self, device: torch.device | str) -> Blocks:
        return replace(self, starts=self.starts.to(device))

    def __str__(self) -> str:
        return f"{self.n} blocks of {self.size}"


@dataclass(frozen=True, eq=False)
class Coarse:
    """Mean keys and values of cells of tokens, which queries read beside the keys of a plan.

    A mean counts as one key: no ln(count) is added to its score, unlike to those of `Pools`.

    Args:
        cell: int64 `[N_k]` in the order of the tensors that a call gets, the number of the cell of
            every token; `size` for a token of none.
        size: number of cells, M.
        plan: which queries, in that order too, read which of the M means; without an order.
    """

    cell: Tensor
    size: int
    plan: BlockPlan

    def to(self, device: torch.device | str) -> Coarse:
        return Coarse(self.cell.to(device), self.size, self.plan.to(device))


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Which key blocks every query block reads.

    Lists are rows of `indices`: the row of (batch b, head h, query block i) starts at
    `offsets[b, h, i]` and holds `full[b, h, i]` entries that need no mask, then
    `partial[b, h, i]` entries masked by the predicate, then the entries of each pool factor; each
    part ascends. A leading dimension of 1 is shared by all batch entries or heads.

    Args:
        q_blocks, k_blocks: how queries and keys are cut.
        indices: int32 `[E]`, key-block numbers.
        offsets: int32 `[1 or B, 1 or H, n_q]`.
        full, partial: int32, shape of `offsets`.
        box, disk: element mask of partial entries, one or the other; `None` where there are none,
            or `words` mask them.
        bias: float32 `[E]`, added to the scaled scores of every exact entry, -inf for one that
            weighs nothing; `None`: nothing is.
        words: int32 `[E, ceil(k_blocks.size / 32)]`, in the place of a box or a disk: bit j % 32 of
            word j // 32 says whether the queries of its row read key j of a partial entry.
        pools: entries that are read as means; `None`: every entry is exact.
        tail: what stands for the key blocks that a row does not list: nothing; their mean key and
            value with bias ln(count) (`"zeroth"`); or that and a first-order term of Taylor's
            series, from the key-value covariance of each block (`"block"`) or, for all of them,
            from the mean covariance per token (`"first"`, PISA, arXiv 2602.01077).
        hidden: bool `[1 or B, n_k]`, key blocks that the tail must not stand for and that no row
            may list, such as text padding; `None`: there are none.
        coarse: further keys, means over cells of tokens; `attend` adds them, backends do not.
        order: the permutation that leads from the caller's order to plan order; `None`: none.
        scale: what the caller's scale of the scores is multiplied by; above 0.
        uneven: whether some rows may be so much longer than others that kernels do well to begin
            with them; no result depends on it.
        lasting: whether the plan was made for many calls, so that launches do well to take pains
            once; no result depends on it. Plans from q and k were not.
    """

    q_blocks: Blocks
    k_blocks: Blocks
    indices: Tensor
    offsets: Tensor
    full: Tensor
    partial: Tensor
    box: BoxPredicate | None = None
    disk: DiskPredicate | None = None
    bias: Tensor | None = None
    words: Tensor | None = None
    pools: Pools | None = None
    tail: Tail = "none"
    hidden: Tensor | None = None
    coarse: Coarse | None = None
    order: Permutation | None = None
    scale: float = 1.0
    uneven: bool = False
    lasting: bool = False

    def __post_init__(self) -> None:
        others = ("bias", "words", "hidden")
        given = [name for name in others if getattr(self, name) is not None]
        make_contiguous(self, ("indices", "offsets", "full", "partial", *given))

    @classmethod
    def from_mask(
        cls,
        visited: Tensor,
        q_blocks: Blocks,
        k_blocks: Blocks,
        *,
        full: Tensor | None = None,
        box: BoxPredicate | None = None,
        tail: Tail = "none",
        order: Permutation | None = None,
    ) -> BlockPlan:
        """Builds the lists of a block mask.

        Args:
            visited: bool `[B, H, n_q, n_k]` (leading dimensions may be 1): blocks to read.
            full: bool, same shape: visited blocks that the box does not mask; without a box, all.
            box, tail, order: the plan's fields of these names.

        Raises:
            ValueError: a mask of another shape or dtype, or `full` and `box` not both given.
        """
        _check_masks(visited, full, (q_blocks.n, k_blocks.n))
        if (full is None) != (box is None):
            raise ValueError(
                "Expected both a mask of full blocks and a box for the others, or neither, got "
                f"{'no mask of full blocks' if full is None else 'no box'}."
            )
        whole = visited if full is None else visited & full
        n_k = k_blocks.n
        # Sorting (class, block number) pairs packed into one key puts full entries first, both
        # parts ascending, unvisited ones last.
        rank = torch.where(whole, 0, torch.where(visited, 1, 2)) * n_k
        rank = rank + torch.arange(n_k, device=visited.device)
        rank = rank.sort(-1).values
        indices = (rank[rank < 2 * n_k] % n_k).to(torch.int32)
        count = visited.sum(-1, dtype=torch.int32)
        ends = count.flatten().cumsum(0, dtype=torch.int64)
        check_entries(indices.numel())
        offsets = (ends.view(count.shape) - count).to(torch.int32)
        n_full = whole.sum(-1, dtype=torch.int32)
        return cls(
            q_blocks=q_blocks,
            k_blocks=k_blocks,
            indices=indices,
            offsets=offsets,
            full=n_full,
            partial=count - n_full,
            box=box,
            tail=tail,
            order=order,
            uneven=uneven(count),
            lasting=True,
        )

    @property
    def device(self) -> torch.device:
        return self.indices.device

    @property
    def predicate(self) -> Predicate | None:
        """What masks the elements of partial entries: the box or the disk."""
        return self.disk if self.box is None else self.box

    @property
    def masked(self) -> bool:
        """Whether anything masks the elements of partial entries."""
        return self.predicate is not None or self.words is not None

    @property
    def batch(self) -> int:
        """Batch size that the plan is for; 1 when it serves any."""
        lists = self.offsets.shape[0]
        return lists if self.hidden is None else max(lists, self.hidden.shape[0])

    @cached_property
    def visited(self) -> Tensor:
        """bool `[1 or B, 1 or H, n_q, n_k]`: the blocks that are listed, exact or pooled."""
        count = self.count.reshape(-1)
        rows = torch.arange(count.numel(), device=self.device).repeat_interleave(count)
        visited = torch.zeros(count.numel(), self.k_blocks.n, dtype=torch.bool, device=self.device)
        visited[rows, self.indices[self.entries].long()] = True
        return visited.view(*self.offsets.shape, self.k_blocks.n)

    @cached_property
    def box_by_block(self) -> tuple[Tensor, Tensor]:
        """The box's keys in rows, see `BoxPredicate.by_block`."""
        if self.box is None:
            raise ValueError("Expected a plan with a box, got one without. Ask for `box` first.")
        return self.box.by_block(self.k_blocks.starts, self.k_blocks.size)

    @cached_property
    def mask_product(self) -> MaskProduct | None:
        """`MaskProduct.of` this plan."""
        return MaskProduct.of(self)

    @cached_property
    def count(self) -> Tensor:
        """int32, shape of `offsets`: entries of every row."""
        exact = self.full + self.partial
        return exact if self.pools is None else exact + self.pools.counts.sum(-1, dtype=torch.int32)

    @cached_property
    def masked_rows(self) -> Tensor:
        """int32, query blocks with partial entries in any head; waits for the device."""
        return (self.partial > 0).any(0).any(0).nonzero()[:, 0].int()

    @cached_property
    def entries(self) -> Tensor:
        """int64 positions in `indices` of every entry in use, row by row."""
        count = self.count.reshape(-1).long()
        first = self.offsets.reshape(-1).long() - (count.cumsum(0) - count)
        total = int(count.sum())
        return first.repeat_interleave(count, output_size=total) + torch.arange(
            total, device=self.device
        )

    @cached_property
    def spans(self) -> tuple[Tensor, Tensor]:
        """int32 `[E]` twice: first key position and number of keys of every entry."""
        starts, lengths = self.k_blocks.starts[:-1], self.k_blocks.lengths
        # Indexing by brackets would make an int64 copy of the indices first.
        return starts.index_select(0, self.indices), lengths.index_select(0, self.indices)

    @cached_property
    def density(self) -> float:
        """Measured share of the N_q x N_k score matrix that is computed.

        Whole entries count, masked elements included, since a kernel computes them; an entry of
        pool level g counts 1/g of its block, and a tail one row per unlisted block.
        """
        return float(self.density_tensor)

    @cached_property
    def density_tensor(self) -> Tensor:
        """`density` as a float64 scalar on the plan's device, without waiting for it."""
        rows = self.offsets[..., 0].numel() * self.q_blocks.starts[-1].double()
        share = (self.q_blocks.lengths * keys_read(self)).sum() / (rows * self.k_blocks.starts[-1])
        if (coarse := self.coarse) is None:
            return share
        return share + coarse.plan.density_tensor * (coarse.size / self.k_blocks.starts[-1])

    def element_mask(self, head: int, q: slice | Tensor, k: slice | Tensor) -> Tensor | None:
        """bool mask of a partial entry between the given plan positions; `None`: all visible."""
        return None if self.predicate is None else self.predicate.mask(head, q, k)

    def to_mask(self) -> Tensor:
        """bool `[1 or B, H', N_q, N_k]`: which query reads which key, in the caller's order.

        For looking at and for tests: memory grows with N_q x N_k. H' is 1 when nothing differs
        between heads. Pooled entries count as read, tails and coarse keys do not.
        """
        heads = max(
            self.offsets.shape[1],
            1 if self.predicate is None else self.predicate.heads,
            1 if self.order is None or self.order.index.ndim == 1 else self.order.index.shape[0],
        )
        q_of, k_of = self.q_blocks.of_token, self.k_blocks.of_token
        full = self.listed("full").expand(-1, heads, -1, -1)[..., q_of[:, None], k_of]
        part = self.listed("partial").expand(-1, heads, -1, -1)[..., q_of[:, None], k_of]
        if self.words is not None:
            part = words.read_keys(self).expand(-1, heads, -1, -1)[..., q_of, :]
        if (predicate := self.predicate) is not None:
            every = slice(None)
            part = part & torch.stack([predicate.mask(h, every, every) for h in range(heads)])
        pooled = self.listed("pooled").expand(-1, heads, -1, -1)[..., q_of[:, None], k_of]
        mask = full | part | pooled
        if self.order is None:
            return mask
        inverse = self.order.inverse.expand(heads, -1)
        heads_index = torch.arange(heads, device=self.device)[:, None, None]
        return mask[:, heads_index, inverse[:, :, None], inverse[:, None, :]]

    def listed(self, part: Literal["full", "partial", "pooled"]) -> Tensor:
        """`visited`, for one part of the lists only."""
        exact = self.full + self.partial
        first, count = {
            "full": (self.offsets, self.full),
            "partial": (self.offsets + self.full, self.partial),
            "pooled": (self.offsets + exact, self.count - exact),
        }[part]
        none = torch.zeros_like(count)
        return replace(self, offsets=first, full=count, partial=none, pools=None).visited

    def to(self, device: torch.device | str) -> BlockPlan:
        """The plan with every tensor on `device`."""
        moved = {
            f.name: value.to(device)
            for f in fields(self)
            if hasattr(value := getattr(self, f.name), "to")
        }
        return replace(self, **moved)

    def __str__(self) -> str:
        batch, heads, _ = self.offsets.shape
        extras = [f"tail {self.tail}"] if self.tail != "none" else []
        parts = ("box", "disk", "bias", "words", "pools", "coarse", "order")
        extras += [name for name in parts if getattr(self, name) is not None]
        extras += [f"scale x {self.scale:.4g}"] if self.scale != 1.0 else []
        return (
            f"BlockPlan({self.q_blocks} x {self.k_blocks}, {batch} batch x {heads} heads, "
            f"density {self.density:.3f}{', ' if extras else ''}{', '.join(extras)})"
        )


def _check_masks(visited: Tensor, full: Tensor | None, expected: tuple[int, int]) -> None:
    if visited.ndim != 4 or visited.dtype != torch.bool or visited.shape[2:] != expected:
        raise ValueError(
            f"Expected a bool block mask [B, H, {expected[0]}, {expected[1]}], "
            f"got {visited.dtype} {list(visited.shape)}."
        )
    if full is not None and (full.shape != visited.shape or full.dtype != torch.bool):
        raise ValueError(
            f"Expected a bool mask of full blocks of shape {list(visited.shape)}, as visited "
            f"has, got {full.dtype} {list(full.shape)}."
        )
