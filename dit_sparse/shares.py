"""The exact entries of a plan for two kernels: one without biases, and one that adds the rest.

A kernel whose loop has no room for biases and words runs the entries without. The others are lists
of their own, which a kernel for everything adds to its result: a row's softmax over both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_sparse.plan import BlockPlan
from dit_sparse.tile_lists import check_entries


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


def _made(plan: BlockPlan, masked: bool) -> Shares:
    assert plan.bias is not None
    lists = replace(plan, pools=None, tail="none", hidden=None, coarse=None)
    entry, count = lists.entries, lists.count.flatten().long()
    check_entries(len(entry))
    rows = torch.arange(len(count), device=plan.device)
    row = rows.repeat_interleave(count, output_size=len(entry))
    partial = entry >= (plan.offsets + plan.full).flatten()[row]
    bias = plan.bias[entry]
    others = bias != 0
    if not masked:
        others = others | partial
    # Of a row: plain full and partial entries, the other full and partial ones, unread ones.
    part = torch.where(bias == -torch.inf, 4, 2 * others + partial)
    part, ascending = (5 * row + part).sort(stable=True)
    counts = torch.bincount(part, minlength=5 * len(count)).int().view(*plan.offsets.shape, 5)
    entry = entry[ascending]
    lists = replace(lists, indices=plan.indices[entry])
    first = (count.cumsum(0) - count).int().view(plan.offsets.shape)
    plain = replace(lists, bias=None, words=None)
    plain = _listing(plain, first, counts[..., 0], counts[..., 1])
    first, (full, partial) = first + counts[..., :2].sum(-1).int(), counts[..., 2:4].unbind(-1)
    if not bool((full + partial).any()):
        return Shares(plain, None)
    words = None if plan.words is None else plan.words[entry]
    rest = replace(lists, bias=plan.bias[entry], words=words)
    return Shares(plain, _listing(rest, first, full, partial))


def _listing(plan: BlockPlan, offsets: Tensor, full: Tensor, partial: Tensor) -> BlockPlan:
    """The plan with these rows, and without masks where nothing is masked."""
    plan = replace(plan, offsets=offsets, full=full, partial=partial)
    return plan if bool(partial.any()) else replace(plan, box=None, disk=None, words=None)
