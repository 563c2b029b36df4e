"""Attention and reordering as opaque operators: all that torch.compile sees of the toolkit.

Layers, steps, plans and schedules live behind the operator, on the host. The layer arrives as a
tensor, because a Python number would be a constant of the graph and cost one graph per layer.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Keywords(NamedTuple):
    """What a stock attention call says besides query, key and value, as an operator can take it.

    The first five are those of `torch.nn.functional.scaled_dot_product_attention`; `backend` names
    the function that runs where ours does not.
    """

    mask: Tensor | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    enable_gqa: bool = False
    backend: str = ""


class Core(Protocol):
    """What runs behind the operator; every tensor is `[B, N, H, D]`."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, keywords: Keywords) -> Tensor: ...


class Gate(Protocol):
    """What runs behind the operator that reorders tokens."""

    def reorder(self, x: Tensor) -> Tensor: ...


_numbers = itertools.count()
_enrolled: weakref.WeakValueDictionary[int, Core | Gate] = weakref.WeakValueDictionary()


def enrol(core: Core | Gate) -> Tensor:
    """Makes it reachable from compiled code; returns its ticket, an int64 CPU tensor."""
    number = next(_numbers)
    _enrolled[number] = core
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def _behind(ticket: Tensor) -> Any:
    found = _enrolled.get(int(ticket))
    if found is None:
        raise RuntimeError(
            "Expected the attention processor that this graph was compiled with to be alive, got "
            "one that was removed. Compile the transformer again."
        )
    return found


# A captured CUDA graph would replay the schedule's decisions of the step it was captured in. Torch
# before 2.9 has no such tag and keeps graphs with a CPU input, the ticket, out of CUDA graphs.
_NO_CAPTURE = getattr(torch.Tag, "cudagraph_unsafe", None)
_tags: dict[str, Any] = {} if _NO_CAPTURE is None else {"tags": (_NO_CAPTURE,)}


@torch.library.custom_op("dit_sparse::attend", mutates_args=(), **_tags)
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ticket: Tensor,
    mask: Tensor | None,
    scale: float | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
    backend: str,
) -> Tensor:
    """Runs the core that `ticket` names on `[B, N, H, D]` tensors; contiguous result.

    The rest are `Keywords`, one by one, as the schema of an operator wants them.
    """
    core = _behind(ticket)
    keywords = Keywords(mask, scale, dropout_p, is_causal, enable_gqa, backend)
    return core.attend(query, key, value, keywords).contiguous()


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@torch.library.custom_op("dit_sparse::reorder", mutates_args=(), **_tags)
def reorder(x: Tensor, ticket: Tensor) -> Tensor:
    """Runs the gate that `ticket` names on a tensor; a contiguous copy of the same shape."""
    out = _behind(ticket).reorder(x).contiguous()
    return out.clone() if out.data_ptr() == x.data_ptr() else out  # no operator returns its input


@reorder.register_fake
def _(x: Tensor, ticket: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
