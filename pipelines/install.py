"""Putting processors on a transformer, and the hook that tells its session of every forward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dit_sparse.backend import Precision
from dit_sparse.forward import Forward
from dit_sparse.method import SparseMethod
from dit_sparse.methods.schedule import parts
from dit_sparse.model_identity import OfOneModel
from dit_sparse.pipelines.clock import StepClock
from dit_sparse.pipelines.core import CONTEXT_PARALLEL, AttentionCore
from dit_sparse.pipelines.family import Family, family_of
from dit_sparse.pipelines.hoist import Entrance, replaced
from dit_sparse.pipelines.identity import identity_of
from dit_sparse.pipelines.lengths import NotALength
from dit_sparse.pipelines.processor import sparse_processor
from dit_sparse.session import Session

_ATTRIBUTE = "_dit_sparse"


@dataclass(frozen=True)
class Attachment:
    """One attention module, the processor it had and the one it was given."""

    module: nn.Module
    stock: Any
    sparse: Any


@dataclass(frozen=True, eq=False)
class Installation:
    """Everything that was put on one transformer. It lives on the transformer as an attribute.

    So a deep copy of the transformer has a consistent copy of it, which a hook that closed over
    its state would not.
    """

    family: Family
    session: Session
    clock: StepClock
    attachments: tuple[Attachment, ...]
    entrance: Entrance
    hooks: tuple[RemovableHandle, ...]

    def check(self, transformer: nn.Module) -> None:
        """Refuses a forward that would not do what was asked for.

        Raises:
            RuntimeError: something replaced our processors.
            NotImplementedError: the transformer has become context parallel.
        """
        _refuse_context_parallel(transformer)
        lost = [a for a in self.attachments if a.module.processor is not a.sparse]
        if lost:
            raise RuntimeError(
                f"Expected the sparse attention processors of {type(transformer).__name__}, got "
                f"{type(lost[0].module.processor).__name__} on {len(lost)} of "
                f"{len(self.attachments)} modules: fuse_qkv_projections, an adapter or a default "
                "processor replaced them. Undo that, or call dit_sparse.remove(), or apply the "
                "method afterwards."
            )


def transformer_of(module: nn.Module) -> nn.Module:
    """The module itself, out of the wrapper that `torch.compile` puts around it."""
    return getattr(module, "_orig_mod", module)


def installation_of(transformer: nn.Module) -> Installation | None:
    """What is installed on a transformer, if anything."""
    return vars(transformer_of(transformer)).get(_ATTRIBUTE)


def attention_modules(transformer: nn.Module, family: Family) -> dict[str, nn.Module]:
    """The family's self-attention modules by name, in order.

    Raises:
        ValueError: there are none.
    """
    found = {n: m for n, m in transformer.named_modules() if family.attends(n)}
    if not found:
        raise ValueError(
            f"Expected modules named like {family.attention} in {type(transformer).__name__}, got "
            "none. The family's description does not fit this version of diffusers."
        )
    return found


def prepare(
    transformer: nn.Module,
    method: SparseMethod,
    backend: str | None,
    precision: Precision = "bf16",
) -> dict[str, Attachment]:
    """Makes the session and the processors of a transformer, and touches nothing yet.

    Returns:
        An attachment for every self-attention module, by module name.

    Raises:
        ValueError: an unknown transformer, one that the method was not made for, or a processor
            that the family does not know.
        NotImplementedError: the transformer is context parallel.
    """
    family = family_of(transformer)
    _refuse_context_parallel(transformer)
    for part in parts(method):
        if isinstance(part, OfOneModel):
            part.check_model(identity_of(transformer))
    modules = attention_modules(transformer, family)
    session = Session(method, tuple(modules), backend, precision)
    attachments = {}
    for layer, (name, module) in enumerate(modules.items()):
        stock = _stock_processor(transformer, module)
        if type(stock).__name__ not in family.processors:
            raise ValueError(
                f"Expected a processor of class {' or '.join(family.processors)} on {name}, got "
                f"{type(stock).__name__}. Undo what put it there (fused projections, an adapter, "
                "another acceleration library) first."
            )
        sparse = sparse_processor(stock, AttentionCore(session, layer, module))
        _carry_backend(module.processor, sparse)
        attachments[name] = Attachment(module, stock, sparse)
    return attachments


def attach(
    transformer: nn.Module,
    attachments: Mapping[str, Attachment],
    clock: StepClock,
    *,
    hoist: bool = True,
) -> Installation:
    """Gives prepared processors to the modules and registers hooks; replaces what was there.

    Args:
        hoist: whether tokens may be put into the order of the plans once per forward.
    """
    detach(transformer)
    for attachment in attachments.values():
        _set_processor(attachment.module, attachment.sparse)
    first = next(iter(attachments.values()))
    family, session = family_of(transformer), first.sparse.core.session
    closed = None if hoist else "hoist=False"
    heads: Any = first.module.heads
    entrance = Entrance.of(transformer, family.hoist, session, heads, closed)
    installation = Installation(
        family=family,
        session=session,
        clock=clock,
        attachments=tuple(attachments.values()),
        entrance=entrance,
        hooks=(
            transformer.register_forward_pre_hook(before_forward, with_kwargs=True),
            transformer.register_forward_hook(after_forward, always_call=True),
        ),
    )
    setattr(transformer, _ATTRIBUTE, installation)
    return installation


def detach(transformer: nn.Module) -> None:
    """Puts the stock processors back and takes hook and state away; does nothing when none is on.

    A processor that something else has put in the place of ours stays.
    """
    installation = installation_of(transformer)
    if installation is None:
        return
    for attachment in installation.attachments:
        if attachment.module.processor is attachment.sparse:
            _carry_backend(attachment.sparse, attachment.stock)
            _set_processor(attachment.module, attachment.stock)
    installation.entrance.remove()
    for hook in installation.hooks:
        hook.remove()
    delattr(transformer, _ATTRIBUTE)


@torch.compiler.disable
def before_forward(
    transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The forward pre-hook: reads layout and step, tells the session, and reorders arguments."""
    installation = installation_of(transformer)
    if installation is None:
        return None
    installation.check(transformer)
    arguments = _bind(transformer, args, kwargs)
    moment = installation.clock.read(arguments.get("timestep"))
    try:
        layout, obstacle = installation.family.layout(transformer, arguments), None
    except NotALength as error:
        layout, obstacle = None, str(error)
    installation.session.begin(
        Forward(
            layout=layout,
            obstacle=obstacle,
            step=moment.step,
            steps=moment.steps,
            generation=moment.generation,
            makes_masks=installation.family.makes_masks,
        )
    )
    order = installation.entrance.begin(transformer, arguments)
    if order is None:
        return None
    changed = installation.entrance.changed(order, arguments)
    signature = _signature(type(transformer))  # type: ignore[arg-type]
    return replaced(signature, args, kwargs, changed)


@torch.compiler.disable
def after_forward(transformer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """The forward hook; without an output when the forward raised."""
    installation = installation_of(transformer)
    if installation is None:
        return
    flow = installation.session.tokens
    if output is None:
        flow.start(None)
    else:
        flow.end()


def _bind(
    transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Mapping[str, Any]:
    signature = _signature(type(transformer))  # type: ignore[arg-type]
    bound = signature.bind(transformer, *args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


@cache
def _signature(model: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(model.forward)


def _stock_processor(transformer: nn.Module, module: nn.Module) -> Any:
    """The processor of a module, or the one it had before ours."""
    installation = installation_of(transformer)
    attachments = () if installation is None else installation.attachments
    return next((a.stock for a in attachments if a.sparse is module.processor), module.processor)


def _set_processor(module: nn.Module, processor: Any) -> None:
    setter = getattr(module, "set_processor", None)
    if callable(setter):
        setter(processor)
    else:  # MochiAttention has none
        module.processor = processor


def _carry_backend(source: Any, target: Any) -> None:
    """Keeps what `set_attention_backend` said to a processor that is about to be replaced."""
    backend = getattr(source, "_attention_backend", None)
    if hasattr(target, "_attention_backend") and target._attention_backend != backend:
        target._attention_backend = backend


def _refuse_context_parallel(transformer: nn.Module) -> None:
    parallel = getattr(transformer, "_parallel_config", None)
    if getattr(parallel, "context_parallel_config", None) is not None:
        raise NotImplementedError(CONTEXT_PARALLEL)
