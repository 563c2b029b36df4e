"""Making a pipeline sparse, making it stock again, and asking what ran."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from dit_sparse.attention import check_backend
from dit_sparse.backend import Precision
from dit_sparse.method import SparseMethod
from dit_sparse.methods import MethodSpec
from dit_sparse.pipelines.clock import StepClock
from dit_sparse.pipelines.defaults import method_for
from dit_sparse.pipelines.family import families, family_of
from dit_sparse.pipelines.install import (
    attach,
    attention_modules,
    detach,
    installation_of,
    prepare,
    transformer_of,
)
from dit_sparse.record import Summary

T = TypeVar("T")


def apply(
    target: T,
    method: MethodSpec = "window",
    *,
    options: Mapping[str, Any] | None = None,
    backend: str | None = None,
    steps: int | None = None,
    hoist: bool = True,
    precision: Precision = "bf16",
) -> T:
    """Makes the self-attention of a pipeline or transformer sparse.

    Applying again replaces the method and starts a new record. Apply last: after LoRA, fused
    projections and adapters, before or after offloading and caches. Give the pipeline that will
    run, so that its scheduler says which step it is; for a bare transformer the `timestep` argument
    does, which waits for the device once per forward.

    Args:
        target: a diffusers pipeline, all of whose transformers are meant, or one transformer.
        method: a method, the name of one, or a mapping from layer number or `"default"` to either.
            For a pipeline also a mapping from component name (`"transformer"`, `"transformer_2"`)
            to any of these; components left out stay as they are.
            A name stands for the method with the defaults of the family, where `defaults.json` has
            some: options, dense layers and, for a pipeline, dense steps.
        options: options of a method given by name, in place of those of the family.
        backend: name of the only attention backend to use; `None` for the best one per call.
        steps: number of denoising steps, where the pipeline cannot say.
        hoist: put tokens into the order of the plans once per forward, where all layers share one;
            otherwise every layer permutes q, k and v. `summary` says which happened.
        precision: what sparse calls multiply in: `"bf16"`, the dtype of the model; `"fp8"`; or
            `"int8"` for queries and keys (`docs/precision.md`). A call that the 8-bit kernel
            cannot run raises a ValueError. Without a GPU, 8 bits are emulated.

    Returns:
        `target`.

    Raises:
        ValueError: an unknown transformer, processor, method, option, layer, backend or precision,
            or `steps` that are no count.
        NotImplementedError: a transformer with context parallelism.
    """
    check_backend(backend, precision)
    transformers = transformers_of(target)
    specs = _per_component(method, transformers)
    pipeline = None if isinstance(target, nn.Module) else target

    def method_of(name: str, spec: Any) -> SparseMethod:
        timed = pipeline is not None or steps is not None
        family = family_of(transformers[name])
        layers = len(attention_modules(transformers[name], family))
        return method_for(family.name, spec, options, layers=layers, timed=timed)

    # Everything that can be refused is refused before anything is changed.
    prepared = [
        (
            transformers[name],
            prepare(transformers[name], method_of(name, spec), backend, precision),
            StepClock(pipeline, steps),
        )
        for name, spec in specs.items()
    ]
    for transformer, attachments, clock in prepared:
        attach(transformer, attachments, clock, hoist=hoist)
    return target


def remove(target: T) -> T:
    """Puts the stock processors back; does nothing where no method is applied. Returns `target`."""
    for transformer in transformers_of(target).values():
        detach(transformer)
    return target


def summary(target: object) -> Summary:
    """What ran since the method was applied, layer by layer. Waits for the device.

    Raises:
        ValueError: no method is applied to `target`.
        RuntimeError: something has replaced the sparse processors.
    """
    rows = []
    for name, transformer in transformers_of(target).items():
        installation = installation_of(transformer)
        if installation is None:
            continue
        installation.check(transformer)
        session = installation.session
        for layer, record in enumerate(session.layers):
            rows.append(record.summarise(name, layer, session.method.name))
    if not rows:
        raise ValueError(
            f"Expected a target with a method applied, got {type(target).__name__} without. Call "
            "dit_sparse.apply() first."
        )
    return Summary(tuple(rows))


def transformers_of(target: object) -> dict[str, nn.Module]:
    """The transformers of a supported family in a pipeline, by component name, or the one given.

    Raises:
        ValueError: there are none.
    """
    if isinstance(target, nn.Module):
        transformer = transformer_of(target)
        family_of(transformer)
        return {type(transformer).__name__: transformer}
    components = getattr(target, "components", None)
    if not isinstance(components, Mapping):
        raise ValueError(
            f"Expected a diffusers pipeline or transformer, got {type(target).__name__}."
        )
    modules = {n: transformer_of(c) for n, c in components.items() if isinstance(c, nn.Module)}
    known = {name for family in families().values() for name in family.transformers}
    found = {n: m for n, m in modules.items() if known & {c.__name__ for c in type(m).__mro__}}
    if not found:
        raise ValueError(
            f"Expected a pipeline with a transformer of a supported family, got "
            f"{type(target).__name__} with {', '.join(sorted(modules)) or 'no models'}. "
            f"Supported: {', '.join(sorted(known))}."
        )
    return found


def _per_component(
    method: MethodSpec, transformers: Mapping[str, nn.Module]
) -> dict[str, MethodSpec]:
    """The specification for each transformer that is meant."""
    names = [key for key in method if isinstance(key, str)] if isinstance(method, Mapping) else []
    if not isinstance(method, Mapping) or not names or "default" in names:
        return dict.fromkeys(transformers, method)
    unknown = sorted(set(names) - set(transformers))
    if unknown or len(names) < len(method):
        raise ValueError(
            f"Expected methods by layer number and 'default', or by transformer "
            f"({', '.join(transformers)}), got keys {list(method)}."
        )
    return {name: method[name] for name in names}
