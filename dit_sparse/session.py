"""The state of one transformer: which forward is running, its plans, the record of its calls."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dit_sparse.attention import attend, dense_attention
from dit_sparse.forward import Forward, StockCall, hides_only_padding, is_key_mask, place
from dit_sparse.grid import TokenLayout
from dit_sparse.method import CallContext, SparseMethod
from dit_sparse.methods.schedule import Schedule
from dit_sparse.plan_cache import PlanCache
from dit_sparse.record import LayerRecord

logger = logging.getLogger("dit_sparse")


class Session:
    """Turns the attention calls of one transformer into sparse or dense ones and counts them.

    Not thread-safe, as a transformer is not. A copy or pickle carries the configuration and the
    numbers of the record, and plans anew.

    Args:
        method: decides which calls are sparse, and plans them.
        layers: names of the attention modules, in order.
        backend: name of the only backend to use; `None` for the best one per call.

    Raises:
        ValueError: a schedule that does not fit this many layers.
    """

    def __init__(
        self, method: SparseMethod, layers: Sequence[str], backend: str | None = None
    ) -> None:
        if isinstance(method, Schedule):
            method.check_layers(len(layers))
        self.method = method
        self.backend = backend
        self.layers = tuple(LayerRecord(name) for name in layers)
        self._reset()

    def _reset(self) -> None:
        self._forward: Forward | None = None
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
        elif self._generation_calls["forwards"] >= _longest(forward.steps):
            self._warn_if_all_dense()
        self._generation_calls["forwards"] += 1
        self._places.clear()
        self._forward = forward

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: StockCall) -> Tensor:
        """One attention call of the forward that runs.

        Args:
            q, k, v: `[B, H, N, D]`, any strides, in the model's order.
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
            return call.run(q, k, v)
        context = CallContext(layout, call.layer, len(self.layers), forward.step, forward.steps)
        reason = self.method.dense_reason(context)
        if reason is not None:
            self._count_dense(call.layer, reason)
            if call.chosen:
                return call.run(q, k, v)
            return dense_attention(q, k, v, scale=call.scale, layout=layout)
        planned = self._plans.get(q, k, context)
        backend, refusals = planned.backend(q, k, v, self.backend)
        out = attend(q, k, v, planned.plan, scale=call.scale, backend=backend).out
        self._generation_calls["sparse"] += 1
        self.layers[call.layer].ran(planned, backend.name, refusals)
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
        return {"method": self.method, "backend": self.backend, "layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


def _longest(steps: int | None) -> int:
    """Forwards after which a generation that is still dense is worth a warning.

    A loop that nobody counts may never end, as far as a session can see. Guidance takes up to four
    forwards per step; few schedules keep more than 32 forwards dense at the start.
    """
    return 32 if steps is None else 4 * steps
