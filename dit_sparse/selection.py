"""Which key blocks a query block reads: scores of block pairs, and rules that choose by them.

Everything stays on the device of the tensors: no rule looks at a value on the host. Scores are
fp32 `[B, H, n_q, n_k]`; a score of -inf is never chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse import correction
from dit_sparse.backend import planning_module
from dit_sparse.frame import Frame
from dit_sparse.levels import plan_of_levels
from dit_sparse.plan import BlockPlan, Tail
from dit_sparse.summaries import Summaries


def block_means(x: Tensor, frame: Frame) -> Tensor:
    """Mean of every block, over its real number of tokens: fp32 `[B, H, n, D]`.

    Args:
        x: `[B, H, N, D]` in the model's order.
    """
    if kernels := planning_module("pool", x):
        x = x if x.stride(-1) == 1 else x.contiguous()
        return kernels.pool(x, frame.blocks, order=frame.order).blocks
    return correction.block_means(_ordered(x, frame), frame.blocks)


def covariance_norms(
    k: Tensor,
    v: Tensor,
    frame: Frame,
    *,
    centred: bool,
    summaries: Summaries | None = None,
) -> Tensor:
    """Frobenius norm of every block's key-value covariance, fp32 `[B, H, n]`.

    Args:
        k, v: `[B, H, N, D]` and `[B, H, N, D_v]` in the model's order.
        centred: norms of the deviations from the mean over blocks.
        summaries: those of the call, which may have the means of k.
    """
    if kernels := planning_module("pool", k):
        means = None if summaries is None else summaries.keys(k, frame)
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
        if means is None:
            means = kernels.pool(k, frame.blocks, order=frame.order).blocks
        return kernels.covariance_norms(
            k, v, frame.blocks, means, centred=centred, order=frame.order
        )
    k, v = _ordered(k, frame), _ordered(v, frame)
    return correction.covariance_norms(k, v, frame.blocks, centred=centred)


def pooled_scores(
    q: Tensor,
    k: Tensor,
    frame: Frame,
    *,
    summaries: Summaries | None = None,
    tail: Tail = "none",
) -> Tensor:
    """Scores of mean queries against mean keys, scaled by `D ** -0.5`: fp32 `[B, H, n, n]`.

    Args:
        q, k: `[B, H, N, D]` in the model's order; k may have fewer heads, each for several of q.
        summaries: those of the call, which get what the pass over q and k can measure for others.
        tail: of the plan to come, which says what they are measured for.
    """
    if summaries is not None:
        found = summaries.measure(q, k, frame, values=tail != "none")
        if found is not None:
            return found.queries @ found.keys.transpose(-2, -1)
    queries, keys = _means_of_both(q, k, frame)
    if (group := q.shape[1] // k.shape[1]) > 1:  # even once, repeating would copy
        keys = keys.repeat_interleave(group, dim=1)
    return (queries * q.shape[-1] ** -0.5) @ keys.transpose(-2, -1)


def of_picture(scores: Tensor, frame: Frame) -> Tensor:
    """The scores with -inf for all blocks but the picture's: text is no matter of choice."""
    return scores.masked_fill(frame.context, -torch.inf) if frame.has_context else scores


def top_k(scores: Tensor, count: int) -> Tensor:
    """bool: the `count` highest scores of each row, fewer where fewer are above -inf."""
    best = scores.topk(min(count, scores.shape[-1]), dim=-1, sorted=False)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter_(-1, best.indices, best.values > -torch.inf)


def top_p(scores: Tensor, mass: float) -> Tensor:
    """bool: the fewest blocks of each row that hold this share of the softmax over its scores.

    A block is chosen while those above it hold less than `mass`, so that one always is.
    """
    share = scores.softmax(-1).nan_to_num_()  # a row of -inf has no shares
    ranked, block = share.sort(dim=-1, descending=True)
    before = ranked.cumsum(-1) - ranked
    chosen = (before < mass) & (ranked > 0)
    return torch.zeros_like(chosen).scatter_(-1, block, chosen)


def above(scores: Tensor, threshold: float) -> Tensor:
    """bool: blocks whose softmax share is at least `threshold` times that of the row's best."""
    best = scores.amax(-1, keepdim=True)
    return (scores - best).exp() >= threshold


def forced_blocks(frame: Frame, names: tuple[str, ...]) -> Tensor | None:
    """bool `[n, n]`: pairs of picture blocks that are read whatever their score.

    Args:
        names: of `FORCED`: `"self"`, `"neighbours"` (and self), `"first_frame"`.

    Raises:
        ValueError: an unknown name.
    """
    for name in names:
        if name not in FORCED:
            raise ValueError(f"Expected forced blocks among {', '.join(FORCED)}, got {name!r}.")
    if not names:
        return None
    number = torch.arange(frame.blocks.n, device=frame.context.device)
    distance = (number[:, None] - number).abs()
    forced = torch.zeros_like(distance, dtype=torch.bool)
    if "self" in names:
        forced |= distance == 0
    if "neighbours" in names:
        forced |= distance <= 1
    if "first_frame" in names:
        forced |= frame.first
    return forced & ~frame.context


FORCED = ("self", "neighbours", "first_frame")


def plan_of_ranks(
    scores: Tensor,
    frame: Frame,
    ends: tuple[int, ...],
    *,
    factors: tuple[int, ...] = (),
    mass: float | None = None,
    tail: Tail = "none",
) -> BlockPlan:
    """The plan that reads the picture's blocks by the rank of their scores, and text by all.

    Args:
        scores: fp32 `[B, H, n, n]`, see `of_picture`.
        ends: how many blocks of a row are exact, and then up to which rank each pool factor goes.
        factors: the pool factors, ascending; one fewer than ends.
        mass: instead of the ends, which then only bound a row: exact blocks until they hold this
            share of the softmax over the row's scores.
        tail: the plan's field of this name.
    """
    kernels = planning_module("choose", scores)
    if kernels and scores.shape[-1] <= kernels.WIDEST:
        return kernels.choose(scores, frame, ends, factors=factors, mass=mass, tail=tail)
    if frame.hidden is not None:
        scores = scores.masked_fill(frame.hidden[:, None, None], -torch.inf)
    if mass is not None:
        level = top_p(scores, mass).to(torch.uint8)
        return plan_of_selection(level, frame, tail=tail, uneven=True)
    level = torch.zeros_like(scores, dtype=torch.uint8)
    # From the coarsest level to the finest: each one overwrites its own part of the last.
    for factor, end in reversed(list(zip((1, *factors), ends, strict=True))):
        if end:
            level.masked_fill_(top_k(scores, end), factor)
    return plan_of_selection(level, frame, factors=factors, room=max(1, ends[-1]), tail=tail)


def plan_of_selection(
    level: Tensor,
    frame: Frame,
    *,
    factors: tuple[int, ...] = (),
    room: int | None = None,
    total: int | None = None,
    tail: Tail = "none",
    uneven: bool = False,
    lasting: bool = False,
) -> BlockPlan:
    """The plan of a choice among the picture's blocks, with text added.

    Text and reference images read every key and are read by every query, exactly; padding is not
    read at all.

    Args:
        level: uint8 `[B, H, n, n]`, see `plan_of_levels`.
        factors: the pool factors that occur.
        room: the most picture blocks that a row may list; `None`: all of them.
        total: instead: entries of the whole plan, text's too, where the host knows.
        tail, uneven, lasting: the plan's fields of these names.
    """
    room = frame.blocks.n if room is None else room
    if frame.has_context:
        level = level.masked_fill(frame.context[:, None] | frame.context, 1)
        room = frame.blocks.n  # the rows of text read all
    if frame.hidden is not None:
        level = level.masked_fill(frame.hidden[:, None, None], 0)
    return plan_of_levels(
        level,
        frame.blocks,
        frame.blocks,
        factors=factors,
        room=room,
        total=total,
        tail=tail,
        hidden=frame.hidden,
        order=frame.order,
        uneven=uneven,
        lasting=lasting,
    )


def _means_of_both(q: Tensor, k: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
    if q.dtype == k.dtype and (kernels := planning_module("pool", q)):
        given = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        queries, keys = kernels.pool_all(given, frame.blocks, means=True, order=frame.order)
        return queries.blocks, keys.blocks
    return block_means(q, frame), block_means(k, frame)


def _ordered(x: Tensor, frame: Frame) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    return x if frame.order is None else frame.order(x)
