"""Attention as one opaque operator: all that torch.compile sees of the toolkit.

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


_numbers = itertools.count()
_cores: weakref.WeakValueDictionary[int, Core] = weakref.WeakValueDictionary()


def enrol(core: Core) -> Tensor:
    """Makes a core reachable from compiled code; returns its ticket, an int64 CPU tensor."""
    number = next(_numbers)
    _cores[number] = core
    return torch.tensor(number, dtype=torch.int64, device="cpu")


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
    core = _cores.get(int(ticket))
    if core is None:
        raise RuntimeError(
            "Expected the attention processor that this graph was compiled with to be alive, got "
            "one that was removed. Compile the transformer again."
        )
    keywords = Keywords(mask, scale, dropout_p, is_causal, enable_gqa, backend)
    return core.attend(query, key, value, keywords).contiguous()


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))
