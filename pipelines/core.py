"""The attention core of a rebound processor: between the stock keywords and the session."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from dit_sparse import ops
from dit_sparse.forward import StockCall
from dit_sparse.session import Session

CONTEXT_PARALLEL = (
    "Expected a transformer without context parallelism, got one with it: each rank would attend "
    "to its own shard only. Use one device per transformer, or remove the sparse method."
)
_SDPA = "sdpa"  # torch's function, where otherwise a diffusers backend is named; "" is the active


class AttentionCore:
    """What a rebound processor calls in place of the attention function of diffusers or torch.

    Eager calls go straight to the session; compiled code sees one opaque operator.

    Args:
        session: the state of the transformer.
        layer: number of the attention module.
        module: the attention module, the only one that is served; a copy serves any.
    """

    def __init__(self, session: Session, layer: int, module: nn.Module | None = None) -> None:
        self.session = session
        self.layer = layer
        self._module = None if module is None else weakref.ref(module)
        self._ticket = ops.enrol(self)

    def serving(self, module: object) -> AttentionCore:
        """This core, for the attention module that asks for it.

        Compiled code is not asked, since its graph serves all layers.

        Raises:
            RuntimeError: the module is not the one that this core was made for.
        """
        if torch.compiler.is_compiling() or self._module is None or self._module() is module:
            return self
        raise RuntimeError(
            "Expected the attention module that this processor was made for, got one of another "
            "transformer. Make a SparseAttnProcessor for each transformer."
        )

    def dispatch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: AttentionBackendName | str | None = None,
        parallel_config: Any = None,
    ) -> Tensor:
        """Stands for `dispatch_attention_fn`: q, k, v `[B, N, H, D]`.

        Raises:
            NotImplementedError: the call is context parallel, or carries what an operator cannot
                take: a mask that is no tensor, or keywords of one backend.
        """
        if parallel_config is not None:
            raise NotImplementedError(CONTEXT_PARALLEL)
        if attention_kwargs or not (attn_mask is None or isinstance(attn_mask, Tensor)):
            raise NotImplementedError(
                "Expected an attention call with a tensor or no mask and no attention_kwargs, got "
                f"a mask of type {type(attn_mask).__name__} and attention_kwargs "
                f"{attention_kwargs}. Remove the sparse method from this transformer."
            )
        name = "" if backend is None else str(getattr(backend, "value", backend))
        keywords = ops.Keywords(attn_mask, scale, dropout_p, is_causal, enable_gqa, name)
        if torch.compiler.is_compiling():
            return ops.attend(query, key, value, self._ticket, *keywords)
        return self.attend(query, key, value, keywords)

    def sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Stands for `F.scaled_dot_product_attention`: q, k, v `[B, H, N, D]`."""
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        keywords = ops.Keywords(attn_mask, scale, dropout_p, is_causal, enable_gqa, _SDPA)
        if torch.compiler.is_compiling():
            return ops.attend(q, k, v, self._ticket, *keywords).transpose(1, 2)
        return self.attend(q, k, v, keywords).transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, keywords: ops.Keywords) -> Tensor:
        """The call itself, on `[B, N, H, D]`; see `dit_sparse.ops.Core`."""
        call = StockCall(
            layer=self.layer,
            mask=keywords.mask,
            scale=keywords.scale,
            run=_stock(keywords),
            obstacle=_obstacle(keywords),
            chosen=_is_chosen(keywords.backend),
        )
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return self.session.attend(q, k, v, call).transpose(1, 2)

    def __getstate__(self) -> dict[str, Any]:
        return {"session": self.session, "layer": self.layer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # a copy answers to its own ticket


def _stock(keywords: ops.Keywords) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The stock attention function on q, k, v `[B, H, N, D]`."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask, scale, dropout_p, is_causal, enable_gqa, backend = keywords
        stock: dict[str, Any] = {
            "attn_mask": mask,
            "dropout_p": dropout_p,
            "is_causal": is_causal,
            "scale": scale,
            "enable_gqa": enable_gqa,
        }
        if backend == _SDPA:
            return F.scaled_dot_product_attention(q, k, v, **stock)
        tokens_first = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        name = AttentionBackendName(backend) if backend else None
        return dispatch_attention_fn(*tokens_first, **stock, backend=name).transpose(1, 2)

    return run


def _obstacle(keywords: ops.Keywords) -> str | None:
    """Why only the stock function can run a call."""
    if keywords.dropout_p or keywords.is_causal or keywords.enable_gqa:
        return (
            "Expected attention without dropout, causal mask and grouped queries, got "
            f"dropout_p={keywords.dropout_p}, is_causal={keywords.is_causal}, "
            f"enable_gqa={keywords.enable_gqa}."
        )
    for mode in _get_current_function_mode_stack():
        if not isinstance(mode, DeviceContext):
            # Perturbed-attention guidance replaces F.scaled_dot_product_attention this way.
            return f"{type(mode).__name__} wants to see the stock attention function."
    return None


def _is_chosen(backend: str) -> bool:
    """Whether the user picked an attention backend of diffusers for this call."""
    if backend == _SDPA:
        return False
    active, _ = _AttentionBackendRegistry.get_active_backend()
    return bool(backend) or active != AttentionBackendName.NATIVE
