"""The state of one transformer: which forward is running, its plans, the record of its calls."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from dit_sparse.attention import dense_attention
from dit_sparse.backend import Precision
from dit_sparse.forward import Forward, StockCall, hides_only_padding, is_key_mask, place
from dit_sparse.grid import TokenLayout
from dit_sparse.hoist import TokenFlow, TokenOrder
from dit_sparse.method import CallContext, SparseMethod
from dit_sparse.methods.schedule import Schedule
from dit_sparse.plan_cache import PlanCache, PlannedCall
from dit_sparse.record import LayerRecord
from dit_sparse.summaries import Summaries

logger = logging.getLogger("dit_sparse")

_ANOTHER_ORDER = "its order is not that of the other layers"


class Session:
    """Turns the attention calls of one transformer into sparse or dense ones and counts them.

    Not thread-safe, as a transformer is not. A copy or pickle carries the configuration and the
    numbers of the record, and plans anew.

    Args:
        method: decides which calls are sparse, and plans them.
        layers: names of the attention modules, in order.
        backend: name of the only backend to use; `None` for the best one per call.
        precision: of the products of sparse calls.

    Raises:
        ValueError: a schedule that does not fit this many layers.
    """

    def __init__(
        self,
        method: SparseMethod,
        layers: Sequence[str],
        backend: str | None = None,
        precision: Precision = "bf16",
    ) -> None:
        if isinstance(method, Schedule):
            method.check_layers(len(layers))
        self.method = method
        self.backend = backend
        self.precision: Precision = precision
        self.layers = tuple(LayerRecord(name) for name in layers)
        self._reset()

    def _reset(self) -> None:
        self._forward: Forward | None = None
        self.tokens = TokenFlow()
        self._apart = ""  # why layers permute for themselves
        self._plans = PlanCache(self.method)
        self._masks: dict[TokenLayout, bool] = {}
        self._places: dict[Any, tuple[TokenLayout | str, Tensor | None]] = {}  # of this forward
        self._generation_calls = Counter[str]()
        self._said: set[str] = set()

    def begin(self, forward: Forward) -> None:
        """Says that a forward of the transformer begins."""
        if self._forward is None or self._forward.generation != forward.generation:
            self._warn_if_all_dense()
            self._generation_calls.clear()
            self._masks.clear()
            self._plans.begin_generation()
        elif self._generation_calls["forwards"] >= _longest(forward.steps):
            self._warn_if_all_dense()
        self._generation_calls["forwards"] += 1
        self._places.clear()
        self._forward = forward
        self.tokens.start(None)
        self._apart = "tokens were not put into the order of the plans at the model's entry"

    @property
    def layout(self) -> TokenLayout | None:
        """The sequence of the forward that runs, if it is known."""
        return None if self._forward is None else self._forward.layout

    def hoist(self, q: Tensor, gates: Collection[int]) -> TokenOrder | None:
        """Decides whether the tokens of the forward that has begun take the order of the plans.

        Args:
            q: of the shape and on the device of the queries to come; its values are not read.
            gates: numbers of the entrances where tokens are going to be put into that order.

        Returns:
            The order, to be put on everything that has one value per token.
        """
        layout = self.layout
        if layout is None:
            return None
        order = self._plans.order(q, layout, len(self.layers))
        if isinstance(order, str):
            self.keep_apart(order)
            return None
        self.tokens.start(order, gates)
        return order

    def keep_apart(self, reason: str) -> None:
        """Says why the layers of the forward that has begun permute for themselves."""
        self._apart = reason
        self.tokens.start(None)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: StockCall) -> Tensor:
        """One attention call of the forward that runs.

        Args:
            q, k, v: `[B, H, N, D]`, any strides, in the order of the forward: the model's, unless
                its tokens were put into another.
            call: what the stock processor asked for.

        Returns:
            `[B, H, N, D]` in the dtype of `q`.

        Raises:
            RuntimeError: no forward of the transformer has begun.
        """
        forward = self._forward
        if forward is None:
            raise RuntimeError(
                "Expected an attention call in a forward of the transformer that the method was "
                "applied to, got one before any. Call the transformer itself, not its parts or its "
                "forward method, and make a SparseAttnProcessor for each transformer."
            )
        layout = self._place(q, k, call, forward)
        if isinstance(layout, str):
            self.pass_through(call.layer, layout)
            return _in_model_order(self.tokens.inside(), call.run, q, k, v)
        known = (layout, call.layer, len(self.layers), forward.step, forward.steps, v)
        context = CallContext(*known, summaries=Summaries(q, k, v))
        order = self.tokens.inside()
        reason = self.method.dense_reason(context)
        if reason is not None:  # attention with all tokens is the same in any order of them
            self._count_dense(call.layer, reason)
            if call.chosen:
                return call.run(q, k, v)
            return dense_attention(q, k, v, scale=call.scale, layout=layout)
        if order is not None:
            starts = self._plans.starts_from(order, q, context)
            if starts is False:
                self.layers[call.layer].permuted[_ANOTHER_ORDER] += 1
                return _in_model_order(order, partial(self._plan_and_run, context, call), q, k, v)
            if starts:
                context = replace(context, ordered=True)
        planned = self._plans.get(q, k, context)
        record = self.layers[call.layer]
        if order is not None:
            within = planned if context.ordered else planned.within(order)
            if within is not None:
                record.hoisted += 1
                return self._run(within, call, q, k, v, context.summaries)
            record.permuted[_ANOTHER_ORDER] += 1
            return _in_model_order(order, partial(self._run, planned, call), q, k, v)
        if planned.plan.order is not None:
            record.permuted[self._apart] += 1
        return self._run(planned, call, q, k, v, context.summaries)

    def _plan_and_run(
        self, context: CallContext, call: StockCall, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """A sparse call on tensors in the model's order."""
        context = replace(context, values=v, summaries=Summaries(q, k, v))
        planned = self._plans.get(q, k, context)
        return self._run(planned, call, q, k, v, context.summaries)

    def _run(
        self,
        planned: PlannedCall,
        call: StockCall,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        summaries: Summaries | None = None,
    ) -> Tensor:
        """A sparse call on tensors in the order that the plan begins with."""
        out, prepared = planned.run(
            q, k, v, call.scale, self.backend, self.precision, summaries=summaries
        )
        self._generation_calls["sparse"] += 1
        self.layers[call.layer].ran(planned, prepared.backend.name, prepared.refusals)
        return out

    def pass_through(self, layer: int, reason: str) -> None:
        """Records a call that only the stock core can run; every reason is logged once."""
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("Dense attention in %s: %s", self.layers[layer].name, reason)
        self._count_dense(layer, reason)

    def _place(self, q: Tensor, k: Tensor, call: StockCall, forward: Forward) -> TokenLayout | str:
        """The layout of a call or why it has none; found once per forward for calls alike."""
        mask, seen = call.mask, None
        if mask is not None:
            seen = mask.shape if forward.makes_masks else id(mask)
        key = (q.shape, k.shape, call.obstacle, seen)
        if key not in self._places:
            layout = place(q, k, call, forward)
            if mask is not None and not isinstance(layout, str):
                layout = self._unless_masked(layout, mask, forward)
            self._places[key] = (layout, mask)  # an id lasts with its mask
        return self._places[key][0]

    def _unless_masked(
        self, layout: TokenLayout, mask: Tensor, forward: Forward
    ) -> TokenLayout | str:
        """The layout if the mask says nothing else; reading the mask waits for the device.

        A mask that the transformer makes from the lengths in the layout says the same in every
        forward: its values are read once per layout and generation, to see that it is so.
        """
        if forward.makes_masks:
            if layout not in self._masks:
                self._masks[layout] = hides_only_padding(mask, layout)
            same = self._masks[layout] and is_key_mask(mask)
        else:
            same = hides_only_padding(mask, layout)
        if same:
            return layout
        return (
            f"Expected an attention mask that only hides text padding ({layout}), got another "
            f"mask {list(mask.shape)}."
        )

    def _count_dense(self, layer: int, reason: str) -> None:
        self.layers[layer].dense[reason] += 1
        self._generation_calls["dense"] += 1
        forward = self._forward
        if forward is None or forward.step is None or forward.steps is None:
            return
        if forward.step == forward.steps - 1 and layer == len(self.layers) - 1:
            self._warn_if_all_dense()

    def _warn_if_all_dense(self) -> None:
        """Warns, once, when a sparse method was asked for and a generation had no sparse call."""
        calls = self._generation_calls
        if self.method.name == "dense" or calls["sparse"] or not calls["dense"]:
            return
        sentence = f"Method {self.method.name} ran no sparse attention"
        if sentence in self._said:
            return
        self._said.add(sentence)
        reasons = Counter[str]()
        for record in self.layers:
            reasons.update(record.dense)
        logger.warning(
            "%s in %d forwards of a generation. Most frequent reason: %s",
            *(sentence, calls["forwards"], reasons.most_common(1)[0][0]),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "backend": self.backend,
            "precision": self.precision,
            "layers": self.layers,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


def _in_model_order(
    order: TokenOrder | None,
    run: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> Tensor:
    """What `run` makes of q, k, v `[B, H, N, D]` in the model's order, put back into `order`.

    For what may depend on the position of a token, such as a mask.
    """
    if order is None:
        return run(q, k, v)
    q, k, v = (order.undo(x, 2) if x.shape[2] in order.by_length else x for x in (q, k, v))
    out = run(q, k, v)
    return order.put(out, 2) if out.shape[2] in order.by_length else out


def _longest(steps: int | None) -> int:
    """Forwards after which a generation that is still dense is worth a warning.

    A loop that nobody counts may never end, as far as a session can see. Guidance takes up to four
    forwards per step; few schedules keep more than 32 forwards dense at the start.
    """
    return 32 if steps is None else 4 * steps
