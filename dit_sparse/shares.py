"""The exact entries of a plan with biases, for a kernel that adds them and for kernels that do not.

A kernel whose loop has no room for biases and words runs the entries without. The others are lists
of their own, which a kernel for everything adds to its result: a row's softmax over both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_sparse.list_lengths import check_entries
from dit_sparse.plan import BlockPlan


@dataclass(frozen=True, eq=False)
class Shares:
    """Both are plans of exact entries alone, without pools, tails and coarse keys.

    Args:
        plain: the entries whose bias is 0, as a plan without biases.
        rest: the others; `None`: there are none. Entries with a bias of -inf are in neither.
    """

    plain: BlockPlan
    rest: BlockPlan | None

    @staticmethod
    def of(plan: BlockPlan, *, masked: bool) -> Shares:
        """The shares of a plan with biases. Made once for it, waiting for the device.

        Args:
            masked: whether `plain` holds partial entries too.
        """
        known: dict[bool, Shares] = vars(plan).setdefault("_shares", {})
        if masked not in known:
            known[masked] = _made(plan, masked)
        return known[masked]


def any_plain(plan: BlockPlan) -> bool:
    """Whether an exact entry needs neither words nor a bias; asks the device once for a plan."""
    if plan.bias is None and plan.words is None:
        return True
    known: dict[str, bool] = vars(plan)
    if "_any_plain" not in known:
        rows = plan.full
        if plan.bias is not None:
            plain = Shares.of(plan, masked=plan.box is not None).plain
            rows = plain.full + plain.partial
        known["_any_plain"] = bool(rows.any())
    return known["_any_plain"]


def weighing(plan: BlockPlan) -> BlockPlan:
    """The exact entries of a plan but those with a bias of -inf. Made once for it, waiting for the
    device; a plan without biases as it is."""
    if plan.bias is None:
        return plan
    known: dict[str, BlockPlan] = vars(plan)
    if "_weighing" not in known:
        known["_weighing"] = _weighing(plan)
    return known["_weighing"]


def highest(plan: BlockPlan) -> Tensor:
    """float32, shape of `plan.offsets`: the highest bias of every row's exact entries, 0 where
    there are none."""
    assert plan.bias is not None
    _, entry, row, _ = _exact(plan)
    rows = plan.bias.new_zeros(plan.offsets.numel())
    rows.scatter_reduce_(0, row, plan.bias[entry], "amax", include_self=False)
    return rows.view(plan.offsets.shape)


def _exact(plan: BlockPlan) -> tuple[BlockPlan, Tensor, Tensor, Tensor]:
    """The plan with its exact entries alone, where they stand, row by row; their rows, and which
    are partial."""
    lists = replace(plan, pools=None, tail="none", hidden=None, coarse=None)
    entry, count = lists.entries, lists.count.flatten().long()
    check_entries(len(entry))
    rows = torch.arange(len(count), device=plan.device)
    row = rows.repeat_interleave(count, output_size=len(entry))
    return lists, entry, row, entry >= (plan.offsets + plan.full).flatten()[row]


def _weighing(plan: BlockPlan) -> BlockPlan:
    assert plan.bias is not None
    lists, entry, row, partial = _exact(plan)
    kept = plan.bias[entry] != -torch.inf
    entry, part = entry[kept], (2 * row + partial)[kept]
    counts = torch.bincount(part, minlength=2 * plan.offsets.numel()).int()
    full, partial = counts.view(*plan.offsets.shape, 2).unbind(-1)
    count = (full + partial).flatten()
    first = (count.cumsum(0) - count).int().view(plan.offsets.shape)
    return _listing(_picked(lists, entry), first, full, partial)


def _made(plan: BlockPlan, masked: bool) -> Shares:
    assert plan.bias is not None
    lists, entry, row, partial = _exact(plan)
    count = lists.count.flatten().long()
    bias = plan.bias[entry]
    others = bias != 0
    if not masked:
        others = others | partial
    # Of a row: plain full and partial entries, the other full and partial ones, unread ones.
    part = torch.where(bias == -torch.inf, 4, 2 * others + partial)
    part, ascending = (5 * row + part).sort(stable=True)
    counts = torch.bincount(part, minlength=5 * len(count)).int().view(*plan.offsets.shape, 5)
    lists = _picked(lists, entry[ascending])
    first = (count.cumsum(0) - count).int().view(plan.offsets.shape)
    plain = replace(lists, bias=None, words=None)
    plain = _listing(plain, first, counts[..., 0], counts[..., 1])
    first, (full, partial) = first + counts[..., :2].sum(-1).int(), counts[..., 2:4].unbind(-1)
    if not bool((full + partial).any()):
        return Shares(plain, None)
    return Shares(plain, _listing(lists, first, full, partial))


def _picked(plan: BlockPlan, entry: Tensor) -> BlockPlan:
    """The plan with these entries, whose rows are to be given."""
    bias, words = (None if x is None else x[entry] for x in (plan.bias, plan.words))
    return replace(plan, indices=plan.indices[entry], bias=bias, words=words)


def _listing(plan: BlockPlan, offsets: Tensor, full: Tensor, partial: Tensor) -> BlockPlan:
    """The plan with these rows, and without masks where nothing is masked."""
    plan = replace(plan, offsets=offsets, full=full, partial=partial)
    return plan if bool(partial.any()) else replace(plan, box=None, disk=None, words=None)
