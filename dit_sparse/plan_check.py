"""Whether a plan is well-formed, and whether it fits given tensors.

Kernels trust plans and read memory by them, so a plan from outside (a file, a new method under
test) passes through `check` first. It synchronises with the device: not for the inner loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import get_args

import torch
from torch import Tensor

from dit_sparse.plan import BlockPlan, Blocks, Coarse, Pools, Tail
from dit_sparse.predicate import BoxPredicate, DiskPredicate

_MAX_FACTOR = 128


def check(plan: BlockPlan) -> BlockPlan:
    """Returns the plan if a kernel may run it.

    Raises:
        ValueError: the first fault found: a wrong dtype, shape or device, blocks that do not cut
            the sequence, entries out of range, unsorted, repeated, hidden or partial without a
            box, pools, boxes or an order that do not belong to it.
    """
    _check_tensors(plan)
    _check_blocks(plan.q_blocks, "q_blocks")
    _check_blocks(plan.k_blocks, "k_blocks")
    _check_rows(plan)
    if plan.pools is not None:
        _check_pools(plan, plan.pools)
    _check_ends(plan)
    _check_entries(plan)
    _check_hidden(plan)
    if plan.box is not None:
        _check_box(plan, plan.box)
    if plan.disk is not None:
        _check_disk(plan, plan.disk)
    _check_marks(plan)
    _check_heads(plan)
    _check_order(plan)
    if plan.coarse is not None:
        _check_coarse(plan, plan.coarse)
    if not 0.0 < plan.scale < math.inf:
        raise ValueError(f"Expected a scale above 0, got {plan.scale}.")
    if plan.tail not in get_args(Tail):
        raise ValueError(f"Expected a tail among {', '.join(get_args(Tail))}, got {plan.tail!r}.")
    return plan


def check_for(plan: BlockPlan, q: Tensor, k: Tensor) -> BlockPlan:
    """Returns the plan if it was made for tensors like these.

    Args:
        q: `[B, H, N_q, D]`.
        k: `[B, H, N_k, D]`.

    Raises:
        ValueError: other lengths, batch size, heads or device than the plan's.
    """
    wanted = (plan.q_blocks.total, plan.k_blocks.total)
    got = (q.shape[2], k.shape[2])
    if wanted != got:
        raise ValueError(
            f"Expected {wanted[0]} queries and {wanted[1]} keys, got {got[0]} and {got[1]}: the "
            "plan is for another grid or text length. Make the plan from the layout of this call."
        )
    batch = plan.batch
    if batch not in (1, q.shape[0]):
        raise ValueError(
            f"Expected a batch of {batch}, as the plan has, got {q.shape[0]}. "
            "Make the plan from the layout of this call."
        )
    heads = max(_head_counts(plan).values())
    if heads not in (1, q.shape[1]):
        raise ValueError(
            f"Expected {heads} heads, as the plan has, got {q.shape[1]}. Make the plan for this "
            "model."
        )
    if not plan.device == q.device == k.device:
        raise ValueError(
            f"Expected q and k on {plan.device}, where the plan is, got {q.device} and "
            f"{k.device}. Move the plan with plan.to(device)."
        )
    return plan


def tensors(plan: BlockPlan) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a plan with its path, such as `("box.lower", ...)`."""
    yield "q_blocks.starts", plan.q_blocks.starts
    yield "k_blocks.starts", plan.k_blocks.starts
    for name in ("indices", "offsets", "full", "partial"):
        yield name, getattr(plan, name)
    if plan.pools is not None:
        yield "pools.counts", plan.pools.counts
    if plan.hidden is not None:
        yield "hidden", plan.hidden
    if plan.box is not None:
        for name in ("lower", "upper", "above", "below"):
            yield f"box.{name}", getattr(plan.box, name)
    if plan.disk is not None:
        for name in ("centre", "limit", "key"):
            yield f"disk.{name}", getattr(plan.disk, name)
    if plan.bias is not None:
        yield "bias", plan.bias
    if plan.words is not None:
        yield "words", plan.words
    if plan.coarse is not None:
        yield "coarse.cell", plan.coarse.cell
    if plan.order is not None:
        yield "order.index", plan.order.index


_SPECIAL = {
    "hidden": torch.bool,
    "bias": torch.float32,
    "coarse.cell": torch.int64,
    "order.index": torch.int64,
}
_DIMENSIONS = {
    "offsets": 3,
    "full": 3,
    "partial": 3,
    "pools.counts": 4,
    "hidden": 2,
    "words": 2,
    "box.lower": 2,
    "box.upper": 2,
    "disk.centre": 2,
    "disk.limit": 2,
}


def _check_tensors(plan: BlockPlan) -> None:
    for path, tensor in tensors(plan):
        dtype = _SPECIAL.get(path, torch.int32)
        if tensor.dtype != dtype:
            raise ValueError(f"Expected {path} of dtype {dtype}, got {tensor.dtype}.")
        if tensor.device != plan.device:
            raise ValueError(
                f"Expected {path} on {plan.device}, where the indices are, got {tensor.device}. "
                "Move the whole plan with plan.to(device)."
            )
        if path != "order.index" and tensor.ndim != _DIMENSIONS.get(path, 1):
            raise ValueError(
                f"Expected {path} with {_DIMENSIONS.get(path, 1)} dimensions, "
                f"got shape {list(tensor.shape)}."
            )


def _check_blocks(blocks: Blocks, name: str) -> None:
    if blocks.n < 1 or blocks.size < 1:
        raise ValueError(
            f"Expected {name} with at least one block of at least 1 token, got {blocks}."
        )
    if int(blocks.starts[0]) != 0:
        raise ValueError(f"Expected {name} to start at 0, got {int(blocks.starts[0])}.")
    bad = (blocks.lengths < 1) | (blocks.lengths > blocks.size)
    if bool(bad.any()):
        at = _first(bad)
        raise ValueError(
            f"Expected blocks of 1 to {blocks.size} tokens in {name}, got "
            f"{int(blocks.lengths[at])} tokens in block {at}. Cut the sequence with Blocks.of_runs."
        )
    picture = (
        blocks.picture
    )  # kernels number their programs by it: a wrong one leaves rows unwritten
    if picture and (picture.step != 1 or picture.start < 0 or picture.stop > blocks.n):
        raise ValueError(
            f"Expected {name}.picture to be consecutive blocks among 0 to {blocks.n - 1}, got "
            f"{picture}."
        )


def _check_rows(plan: BlockPlan) -> None:
    batch, heads, n_q = plan.offsets.shape
    if batch < 1 or heads < 1 or n_q != plan.q_blocks.n:
        raise ValueError(
            f"Expected offsets of shape [1 or B, 1 or H, {plan.q_blocks.n}], "
            f"got {list(plan.offsets.shape)}."
        )
    for name in ("offsets", "full", "partial"):
        tensor = getattr(plan, name)
        if tensor.shape != plan.offsets.shape:
            raise ValueError(
                f"Expected {name} of the shape of offsets, {list(plan.offsets.shape)}, "
                f"got {list(tensor.shape)}."
            )
        if bool((tensor < 0).any()):
            raise ValueError(f"Expected {name} of at least 0, got {int(tensor.min())}.")


def _check_ends(plan: BlockPlan) -> None:
    ends = plan.offsets.long() + plan.count
    if int(ends.max()) > plan.indices.numel():
        raise ValueError(
            f"Expected rows inside the {plan.indices.numel()} indices, got one that ends at "
            f"{int(ends.max())}."
        )


def _check_entries(plan: BlockPlan) -> None:
    outside = (plan.indices < 0) | (plan.indices >= plan.k_blocks.n)
    if bool(outside.any()):
        raise ValueError(
            f"Expected key blocks 0 to {plan.k_blocks.n - 1}, "
            f"got {int(plan.indices[_first(outside)])}."
        )
    part, row = _parts(plan)
    block = plan.indices[plan.entries].long()
    falling = (part.diff() == 0) & (block.diff() <= 0)
    if bool(falling.any()):
        at = _first(falling)
        raise ValueError(
            "Expected ascending key blocks in each part of a row (full, partial, pooled), got "
            f"{int(block[at])} before {int(block[at + 1])}."
        )
    # Ascending parts repeat a block only between the parts of one row.
    listed = (row * plan.k_blocks.n + block).sort().values
    repeated = listed.diff() == 0
    if bool(repeated.any()):
        raise ValueError(
            "Expected every key block at most once in a row, got block "
            f"{int(listed[_first(repeated)]) % plan.k_blocks.n} in two parts."
        )
    if not plan.masked and bool(plan.partial.any()):
        raise ValueError(
            "Expected a box that masks the partial entries, got none. Give one, or list the "
            "blocks as full."
        )


def _parts(plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """Of each entry in use: the number of its part, counted over all rows, and its row."""
    pooled = [] if plan.pools is None else list(plan.pools.counts.unbind(-1))
    counts = torch.stack([plan.full, plan.partial, *pooled], dim=-1)
    flat = counts.flatten().long()
    part = torch.arange(flat.numel(), device=plan.device).repeat_interleave(flat)
    return part, part // counts.shape[-1]


def _check_pools(plan: BlockPlan, pools: Pools) -> None:
    factors, shape = pools.factors, [*plan.offsets.shape, len(pools.factors)]
    powers = all(isinstance(f, int) and 2 <= f <= _MAX_FACTOR and f & (f - 1) == 0 for f in factors)
    if not factors or not powers or list(factors) != sorted(set(factors)):
        raise ValueError(
            f"Expected ascending pool factors that are powers of two from 2 to {_MAX_FACTOR}, "
            f"got {factors!r}."
        )
    if list(pools.counts.shape) != shape:
        raise ValueError(
            f"Expected pools.counts of shape {shape}, one number for each factor, "
            f"got {list(pools.counts.shape)}."
        )
    if bool((pools.counts < 0).any()):
        raise ValueError(f"Expected pools.counts of at least 0, got {int(pools.counts.min())}.")


def _check_coarse(plan: BlockPlan, coarse: Coarse) -> None:
    keys, (low, high) = plan.k_blocks.total, coarse.cell.aminmax()
    if coarse.cell.shape != (keys,) or low < 0 or high > coarse.size:
        raise ValueError(
            f"Expected coarse.cell of shape [{keys}] with numbers of 0 to {coarse.size}, got "
            f"{list(coarse.cell.shape)} with {int(low)} to {int(high)}."
        )
    if coarse.plan.device != plan.device:
        raise ValueError(
            f"Expected coarse.plan on {plan.device}, where the indices are, got "
            f"{coarse.plan.device}. Move the whole plan with plan.to(device)."
        )
    if coarse.plan.order is not None or coarse.plan.coarse is not None:
        raise ValueError("Expected coarse.plan without an order and coarse keys, got one with.")
    lengths = (coarse.plan.q_blocks.total, coarse.plan.k_blocks.total)
    if lengths != (plan.q_blocks.total, coarse.size):
        raise ValueError(
            f"Expected coarse.plan for {plan.q_blocks.total} queries and {coarse.size} keys, got "
            f"{lengths[0]} and {lengths[1]}."
        )
    check(coarse.plan)


def _check_hidden(plan: BlockPlan) -> None:
    hidden = plan.hidden
    if hidden is None:
        return
    n_k = plan.k_blocks.n
    if hidden.shape[1] != n_k or {hidden.shape[0], plan.offsets.shape[0]} - {1, plan.batch}:
        raise ValueError(
            f"Expected hidden of shape [1 or B, {n_k}] with the batch of the lists, "
            f"got {list(hidden.shape)}."
        )
    listed = plan.visited & hidden[:, None, None]
    if bool(listed.any()):
        raise ValueError(
            f"Expected no row to list a hidden key block, got block {_first(listed) % n_k} in one."
        )


def _check_box(plan: BlockPlan, box: BoxPredicate) -> None:
    heads = box.lower.shape[0]
    queries, keys = [heads, plan.q_blocks.total], [plan.k_blocks.total]
    shapes = {"lower": queries, "upper": queries, "above": keys, "below": keys}
    _check_shapes("box", box, shapes)
    if not isinstance(box.guard, int) or not 0 < box.guard < 2**31:
        raise ValueError(f"Expected box.guard as a positive int of 31 bits, got {box.guard!r}.")
    allowed = (1 << (box.guard.bit_length() - 1)) - 1 & ~box.guard
    for name in shapes:
        corner = getattr(box, name)
        if bool((corner & ~allowed).any()):
            raise ValueError(
                f"Expected box.{name} with values only below the guard bits of {box.guard:#x}, got "
                f"{int(corner[corner & ~allowed != 0][0]):#x}. Give every field one bit more than "
                "its values."
            )


def _check_disk(plan: BlockPlan, disk: DiskPredicate) -> None:
    if plan.box is not None:
        raise ValueError("Expected a box or a disk, got both. Give the one that masks.")
    queries, keys = [disk.heads, plan.q_blocks.total], [plan.k_blocks.total]
    _check_shapes("disk", disk, {"centre": queries, "limit": queries, "key": keys})
    if bool((disk.limit < 1).any()):
        raise ValueError(f"Expected disk.limit above 0, got {int(disk.limit.min())}.")


def _check_marks(plan: BlockPlan) -> None:
    """Bias and words, which stand beside the entries."""
    entries, words = plan.indices.numel(), -(-plan.k_blocks.size // 32)
    if plan.bias is not None:
        if plan.bias.shape != (entries,):
            raise ValueError(f"Expected bias of shape [{entries}], got {list(plan.bias.shape)}.")
        if not bool((plan.bias < torch.inf).all()):
            raise ValueError(
                "Expected a finite bias for every entry, or -inf, got one that is neither. Give "
                "-inf to entries that weigh nothing."
            )
    if plan.words is not None:
        if plan.words.shape != (entries, words):
            raise ValueError(
                f"Expected words of shape [{entries}, {words}], got {list(plan.words.shape)}."
            )
        if plan.predicate is not None:
            raise ValueError(
                "Expected words, a box or a disk, got words and another. Give the one that masks."
            )


def _check_shapes(name: str, predicate: object, shapes: dict[str, list[int]]) -> None:
    for part, shape in shapes.items():
        got = list(getattr(predicate, part).shape)
        if got != shape:
            raise ValueError(f"Expected {name}.{part} of shape {shape}, got {got}.")


def _head_counts(plan: BlockPlan) -> dict[str, int]:
    """How many heads each part of a plan tells apart."""
    counts = {"the lists": plan.offsets.shape[1]}
    if plan.predicate is not None:
        counts["the box" if plan.box else "the disk"] = plan.predicate.heads
    if plan.order is not None and plan.order.index.ndim == 2:
        counts["the order"] = plan.order.index.shape[0]
    return counts


def _check_heads(plan: BlockPlan) -> None:
    counts = {name: n for name, n in _head_counts(plan).items() if n != 1}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        got = " and ".join(f"{n} in {name}" for name, n in counts.items())
        raise ValueError(f"Expected one number of heads, or 1, in all parts of a plan, got {got}.")


def _check_order(plan: BlockPlan) -> None:
    if plan.order is None:
        return
    lengths = (plan.q_blocks.total, plan.k_blocks.total)
    if lengths != (plan.order.length, plan.order.length):
        raise ValueError(
            f"Expected an order of as many tokens as the plan's queries and keys, {lengths[0]} and "
            f"{lengths[1]}, got {plan.order}. Use orders.lift to put a grid's order into a layout."
        )
    plan.order.check()


def _first(flags: Tensor) -> int:
    return int(flags.flatten().nonzero()[0])
