"""Attention as one opaque operator: all that torch.compile sees of the toolkit.

Layers, steps, plans and schedules live behind the operator, on the host. The layer arrives as a
tensor, because a Python number would be a constant of the graph and cost one graph per layer.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor


class Core(Protocol):
    """What runs behind the operator; every tensor is `[B, N, H, D]`."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
        dropout_p: float,
        is_causal: bool,
        enable_gqa: bool,
        backend: str,
    ) -> Tensor: ...


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
    """Runs the core that `ticket` names on `[B, N, H, D]` tensors; contiguous result."""
    core = _cores.get(int(ticket))
    if core is None:
        raise RuntimeError(
            "Expected the attention processor that this graph was compiled with to be alive, got "
            "one that was removed. Compile the transformer again."
        )
    out = core.attend(query, key, value, mask, scale, dropout_p, is_causal, enable_gqa, backend)
    return out.contiguous()


@attend.register_fake
def _(
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
    return query.new_empty((*query.shape[:-1], value.shape[-1]))
