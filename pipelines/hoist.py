"""Puts a forward's tokens into the order of its plans where they enter the model, and back."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dit_sparse import ops
from dit_sparse.hoist import TokenOrder
from dit_sparse.pipelines.family import Hoist, Tokens
from dit_sparse.session import Session

_EXIT = -1


class Gate:
    """A forward hook on a module through whose output tokens enter or leave.

    It follows the name: an adapter that takes the module's place is given the hook at the next
    forward.

    Args:
        session: of the transformer; says which order.
        tokens: which module, and where in its output.
        number: of the entrance; `_EXIT` for the way out.
    """

    def __init__(self, session: Session, tokens: Tokens, number: int) -> None:
        self.session = session
        self.tokens = tokens
        self.number = number
        self._handle: RemovableHandle | None = None
        self._module: nn.Module | None = None
        self._ticket = ops.enrol(self)

    def stand_at(self, transformer: nn.Module) -> None:
        """Takes its place, and no other."""
        module = transformer.get_submodule(self.tokens.name)
        if module is not self._module:
            self.leave()
            self._handle, self._module = module.register_forward_hook(self), module

    def leave(self) -> None:
        """Removes the hook."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._module = None

    def __call__(self, module: nn.Module, inputs: object, output: Any) -> Any:
        """The forward hook."""
        if not isinstance(output, tuple):
            return self._pass(output)
        items = range(len(output)) if self.tokens.items is None else self.tokens.items
        return tuple(self._pass(x) if n in items else x for n, x in enumerate(output))

    def _pass(self, x: Tensor) -> Tensor:
        # Compiled code asks for the order each time it runs: one graph for all of them.
        return ops.reorder(x, self._ticket) if torch.compiler.is_compiling() else self.reorder(x)

    def reorder(self, x: Tensor) -> Tensor:
        """The tensor in the order that it should have from here on; see `dit_sparse.ops.Gate`."""
        flow = self.session.tokens
        if self.number == _EXIT:
            order = flow.leave()
            return x if order is None else order.undo(x, self.tokens.axis)
        order = flow.enter(self.number)
        return x if order is None else _put(x, order, self.tokens)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_ticket"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._ticket = ops.enrol(self)  # a copy answers to its own ticket


@dataclass(frozen=True, eq=False)
class Entrance:
    """Everything that reorders the tokens of one transformer.

    Args:
        facts: of the family; `None` if there are none.
        session: of the transformer.
        heads: of its attention.
        gates: entrances with numbers from 0, and the way out.
        closed: why no forward is reordered, or `None`.
    """

    session: Session
    facts: Hoist
    heads: int
    gates: tuple[Gate, ...]
    closed: str | None = None

    @staticmethod
    def of(
        transformer: nn.Module,
        facts: Hoist | None,
        session: Session,
        heads: int,
        closed: str | None = None,
    ) -> Entrance:
        """Puts gates on the modules of a transformer, unless it is to stay closed."""
        if facts is None and closed is None:
            closed = "it is not known where the tokens of this family enter"
        if facts is None or closed is not None:
            return Entrance(session, Hoist(), heads, (), closed)
        places = (*facts.outputs, Tokens(facts.leaves))
        lacking = [t for t in places if not hasattr(transformer, t.name)]
        if not all(t.optional for t in lacking):
            closed = f"it has no module {next(t.name for t in lacking if not t.optional)}"
            return Entrance(session, Hoist(), heads, (), closed)
        there = [t for t in facts.outputs if t not in lacking]
        gates = [Gate(session, tokens, number) for number, tokens in enumerate(there)]
        gates.append(Gate(session, Tokens(facts.leaves), _EXIT))
        entrance = Entrance(session, facts, heads, tuple(gates))
        entrance.stand_at(transformer)
        return entrance

    def stand_at(self, transformer: nn.Module) -> None:
        """Puts every gate on the module that has its name now."""
        for gate in self.gates:
            gate.stand_at(transformer)

    def remove(self) -> None:
        """Takes the hooks away."""
        for gate in self.gates:
            gate.leave()

    def begin(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> TokenOrder | None:
        """Decides about the forward that has begun: the order that its arguments are to have."""
        reason = self.closed
        if reason is None and torch.is_grad_enabled():
            # Checkpointed blocks run again in the backward pass, without the gates.
            reason = "gradients are enabled"
        if reason is None:
            reason = self.facts.refuses(transformer, arguments)
        if reason is not None:
            self.session.keep_apart(reason)
            return None
        self.stand_at(transformer)
        states: Tensor = arguments["hidden_states"]
        layout = self.session.layout
        if layout is None:
            return None
        like = torch.empty((1, 1, 1, 1), dtype=states.dtype, device=states.device)
        like = like.expand(states.shape[0], self.heads, layout.length, 1)
        return self.session.hoist(like, [g.number for g in self.gates if g.number != _EXIT])

    def changed(self, order: TokenOrder, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that look different in this order."""
        changed: dict[str, Any] = {}
        for tokens in self.facts.arguments:
            value = arguments.get(tokens.name)
            if isinstance(value, (tuple, list)):
                changed[tokens.name] = tuple([_put(x, order, tokens) for x in value])
            elif isinstance(value, Tensor):
                changed[tokens.name] = _put(value, order, tokens)
        return changed


def replaced(
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    changed: Mapping[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with some values changed, each passed the way that it was."""
    names = list(signature.parameters)[1:]  # without self
    positional = tuple(changed.get(n, a) for n, a in zip(names, args, strict=False))
    return positional, kwargs | {n: v for n, v in changed.items() if n in kwargs}


def _put(x: Tensor, order: TokenOrder, tokens: Tokens) -> Tensor:
    if tokens.grid:  # contiguous as a convolution's: other strides would be another graph
        return order.put(x.flatten(tokens.axis), tokens.axis).view(x.shape)
    if x.ndim <= tokens.axis or x.shape[tokens.axis] == 1:
        return x
    return order.put(x, tokens.axis)
