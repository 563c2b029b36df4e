"""Watching the dense pipeline run prompts: what every calibration of a method begins with."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import dit_sparse
from dit_sparse.method import CallContext, PlanScope
from dit_sparse.methods.window import WindowMethod
from dit_sparse.model_identity import ModelIdentity
from dit_sparse.pipelines.apply import apply, remove, summary, transformers_of
from dit_sparse.pipelines.install import installation_of
from dit_sparse.plan import BlockPlan
from dit_sparse.step_segments import Split, segment_table

Prompt = str | Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Observer:
    """A method that shows q and k of chosen calls to a function and changes nothing.

    A chosen call runs a plan that reads every key; all others are dense.

    Args:
        wants: whether a call is chosen.
        see: is given q and k `[B, H, N, D]` in the model's order.
    """

    wants: Callable[[CallContext], bool]
    see: Callable[[Tensor, Tensor, CallContext], None]

    name: ClassVar[str] = "observer"
    scope: ClassVar[PlanScope] = "call"

    def dense_reason(self, ctx: CallContext) -> str | None:
        return None if self.wants(ctx) else "the call is not observed"

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        self.see(q, k, ctx)
        return WindowMethod(density=1.0).plan(q, k, ctx)


def transformer_to_observe(pipe: Any, component: str | None) -> tuple[str, nn.Module]:
    """Name and transformer.

    Raises:
        ValueError: a transformer alone, a pipeline that is sparse already, or several transformers
            and no name of one.
    """
    found = transformers_of(pipe)
    if isinstance(pipe, nn.Module):
        raise ValueError(
            f"Expected a pipeline to calibrate, got the transformer {type(pipe).__name__} alone. "
            "Give the pipeline that will run it."
        )
    for name, transformer in found.items():
        if installation_of(transformer) is not None:
            raise ValueError(
                f"Expected a pipeline without a method to calibrate, got one on {name}. Call "
                "dit_sparse.remove() first."
            )
    if component is None and len(found) == 1:
        return next(iter(found.items()))
    if component not in found:
        raise ValueError(
            f"Expected the name of one transformer to calibrate among {', '.join(found)}, got "
            f"{component!r}. Give component=, and calibrate the others in turn."
        )
    return component, found[component]


def generations_of(
    pipe: Any, prompts: Sequence[Prompt], call: Mapping[str, Any], seed: int
) -> list[dict[str, Any]]:
    """The pipeline's arguments for every prompt, with noise of its own.

    Raises:
        ValueError: no prompt, or arguments that the pipeline does not take.
    """
    if isinstance(prompts, str) or not prompts or not all(prompts):
        raise ValueError(
            f"Expected one or more prompts to calibrate with, none of them empty, got {prompts!r}."
        )
    parameters = inspect.signature(type(pipe).__call__).parameters
    latent = {"output_type": "latent"} if "output_type" in parameters else {}
    generations = []
    for number, prompt in enumerate(prompts):
        words = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
        noise = torch.Generator("cpu").manual_seed(seed + number)
        arguments = {**latent, **call, **words, "generator": noise}
        unknown = [name for name in arguments if name not in parameters]
        if unknown:
            raise ValueError(
                f"Expected arguments that {type(pipe).__name__} takes, got {unknown[0]!r}. Leave "
                "it out."
            )
        generations.append(arguments)
    return generations


def segment_observer(
    segments: int,
    split: Split,
    every: int,
    see: Callable[[Tensor, Tensor, CallContext, int], None],
) -> Observer:
    """Looks at every so many steps of each segment of a generation, and at its first.

    Args:
        segments, split: see `segment_table`.
        see: is given q, k, the context and the segment of its step.
    """

    def table(ctx: CallContext) -> tuple[int, ...]:
        return segment_table(ctx.steps or 1, segments, split)

    def wants(ctx: CallContext) -> bool:
        if ctx.step is None or ctx.steps is None:
            return True  # and what is called says what is missing
        found = table(ctx)
        return (ctx.step - found.index(found[ctx.step])) % every == 0

    def pass_on(q: Tensor, k: Tensor, ctx: CallContext) -> None:
        known = ctx.step is not None and ctx.steps is not None
        see(q, k, ctx, table(ctx)[ctx.step] if known and ctx.step is not None else 0)

    return Observer(wants, pass_on)


class Sums(Protocol):
    """What is added up; a generation that is finished is part of it for good."""

    finished: int

    def save(self, path: Path, settings: Mapping[str, Any]) -> None: ...


def run_all(
    pipe: Any,
    component: str,
    runs: Sequence[tuple[Observer, Mapping[str, Any]]],
    sums: Sums,
    path: Path | None,
    kept: Mapping[str, Any],
    *,
    progress: bool,
) -> None:
    """The generations that are not finished yet, each kept when it is.

    Args:
        component: name of the transformer that is observed.
        runs: an observer that fills the sums, and arguments of the pipeline.
        path: where sums are saved; `None` saves nothing.
        kept: what an interrupted calibration must agree in.
        progress: show a progress bar.

    Raises:
        ValueError: a layer was not observed.
    """
    with tqdm(total=len(runs), desc="calibrating", unit="run", disable=not progress) as bar:
        bar.update(sums.finished)
        for observer, arguments in runs[sums.finished :]:
            _run(pipe, component, observer, arguments)
            sums.finished += 1
            if path is not None:
                sums.save(path, kept)
            bar.update()


def _run(pipe: Any, component: str, observer: Observer, arguments: Mapping[str, Any]) -> None:
    """One generation.

    Raises:
        ValueError: a layer was not observed.
    """
    apply(pipe, {component: observer}, hoist=False)
    try:
        with torch.no_grad():
            pipe(**arguments)
        ran = summary(pipe)
    finally:
        remove(pipe)
    blind = [row for row in ran.rows if not row.sparse]
    if blind:
        reasons = "; ".join(blind[0].reasons) or "it did not run"
        raise ValueError(
            f"Expected attention to measure in every layer, got none in {blind[0].name}: {reasons}"
        )


def origin_of(component: str, identity: ModelIdentity, digest: str) -> dict[str, Any]:
    """Of which transformer and prompts sums are: what a run that goes on must agree in."""
    of = [component, identity.kind, identity.config, identity.name, identity.revision]
    return {"model": of, "prompts": digest}


def digest_of(value: Any) -> str:
    """SHA-256 of prompts and call arguments, whatever they are made of."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        value = sorted(value.items())
    if isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for part in value:
            _feed(digest, part)
    elif isinstance(value, Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif value is None or isinstance(value, (str, int, float)):
        digest.update(repr(value).encode())
    else:  # its repr may hold an address
        digest.update(type(value).__name__.encode())


def versions() -> dict[str, str]:
    """Of the packages that a calibration depends on."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
    return {"dit_sparse": dit_sparse.__version__, **found}
