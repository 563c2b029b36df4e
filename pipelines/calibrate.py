"""Calibrating: the dense pipeline runs a few prompts while its attention maps are measured."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import dit_sparse
from dit_sparse.calibration import Calibration
from dit_sparse.calibration_solver import Settings, Target, check_target, solve
from dit_sparse.method import CallContext, PlanScope
from dit_sparse.methods.window import WindowMethod
from dit_sparse.pipelines.apply import apply, remove, summary, transformers_of
from dit_sparse.pipelines.identity import identity_of
from dit_sparse.pipelines.install import installation_of
from dit_sparse.plan import BlockPlan
from dit_sparse.step_segments import segment_table
from dit_sparse.tally import Tally

logger = logging.getLogger("dit_sparse")

PROGRESS = "progress.safetensors"

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


def calibrate(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    density: float | None = None,
    mass: float | None = None,
    settings: Settings | None = None,
    call: Mapping[str, Any] | None = None,
    component: str | None = None,
    model: str | None = None,
    folder: Path | str | None = None,
    progress: bool = True,
) -> Calibration:
    """Finds an order for each head and block masks for PARO (arXiv 2506.16054).

    The first prompt runs twice: once to compare the orders, then with all others to add up the
    maps in the order of each head. All forwards of a step count, guidance too, since all use the
    masks. Every other call of the generations is dense.

        found = dit_sparse.calibrate(pipe, ["a cat", "a street"], density=0.3, folder="cat")
        found.save_pretrained("cat")
        dit_sparse.apply(pipe, "paro", options={"path": "cat"})

    Args:
        pipe: a pipeline without a method.
        prompts: texts, or call arguments that take the place of one, such as prompt embeddings.
        density: share of the picture's block pairs to read.
        mass: instead of a density: share of each row's softmax mass.
        settings: how to measure; see `Settings`.
        call: further arguments of the pipeline: height, width, num_inference_steps. Masks hold for
            these alone.
        component: name of the transformer, for a pipeline with several.
        model: what to call the model in the result.
        folder: where finished generations are kept, so that an interrupted calibration goes on;
            the file is deleted at the end. `None` keeps nothing.
        progress: show a progress bar.

    Returns:
        The calibration, which is not saved yet.

    Raises:
        ValueError: no prompt, a target out of reach, a pipeline that is sparse already, settings
            that differ from those of an interrupted calibration, or attention that was not seen.
    """
    settings, target = settings or Settings(), Target(density, mass)
    name, transformer = _transformer(pipe, component)
    generations = _generations(pipe, prompts, call or {}, settings)
    identity = identity_of(transformer, model)
    digest = _digest([*prompts, call or {}])
    kept = {"model": [identity.kind, identity.config], "prompts": digest} | _measuring(settings)
    path = None if folder is None else Path(folder) / PROGRESS
    tally = Tally(settings.block) if path is None else Tally.load(path, kept)
    if tally.facts is not None:
        check_target(target, tally.facts.grid, settings.block)
    runs = [(_comparing(tally, settings, target), generations[0])]
    runs += [(_adding(tally, settings), generation) for generation in generations]
    with tqdm(total=len(runs), desc="calibrating", unit="run", disable=not progress) as bar:
        bar.update(tally.finished)
        for observer, arguments in runs[tally.finished :]:
            _run(pipe, name, observer, arguments)
            tally.finished += 1
            if path is not None:
                tally.save(path, kept)
            bar.update()
    provenance = {"prompts": digest, "generations": len(prompts), "versions": _versions()}
    calibration = solve(tally, settings, target, identity, provenance)
    if calibration.dense_heads:
        logger.warning(
            "%d of %d heads keep less than %s of their mass and stay dense; density %.3f.",
            *(len(calibration.dense_heads), calibration.density.numel(), settings.least_mass),
            calibration.provenance["achieved_density"],
        )
    if path is not None:
        path.unlink(missing_ok=True)
    return calibration


def _transformer(pipe: Any, component: str | None) -> tuple[str, nn.Module]:
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


def _generations(
    pipe: Any, prompts: Sequence[Prompt], call: Mapping[str, Any], settings: Settings
) -> list[dict[str, Any]]:
    """The pipeline's arguments for every prompt, with noise of its own."""
    if isinstance(prompts, str) or not prompts or not all(prompts):
        raise ValueError(
            f"Expected one or more prompts to calibrate with, none of them empty, got {prompts!r}."
        )
    parameters = inspect.signature(type(pipe).__call__).parameters
    latent = {"output_type": "latent"} if "output_type" in parameters else {}
    generations = []
    for number, prompt in enumerate(prompts):
        words = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
        noise = torch.Generator("cpu").manual_seed(settings.seed + number)
        arguments = {**latent, **call, **words, "generator": noise}
        unknown = [name for name in arguments if name not in parameters]
        if unknown:
            raise ValueError(
                f"Expected arguments that {type(pipe).__name__} takes, got {unknown[0]!r}. Leave "
                "it out."
            )
        generations.append(arguments)
    return generations


def _comparing(tally: Tally, settings: Settings, target: Target) -> Observer:
    """Compares orders at steps spread over the generation."""

    def wants(ctx: CallContext) -> bool:
        if ctx.steps is None or ctx.step is None:
            return True  # and the tally says what is missing
        count = min(settings.order_steps, ctx.steps)
        return ctx.step in {(2 * i + 1) * ctx.steps // (2 * count) for i in range(count)}

    def see(q: Tensor, k: Tensor, ctx: CallContext) -> None:
        if tally.facts is None:  # what cannot be reached is refused in the first call
            check_target(target, ctx.layout.grid, settings.block)
            segment_table(ctx.steps or 1, settings.segments, settings.split)
        tally.compare_orders(q, k, ctx)

    return Observer(wants, see)


def _adding(tally: Tally, settings: Settings) -> Observer:
    """Adds up maps at every so many steps of each segment."""

    def segment(ctx: CallContext) -> int:
        assert ctx.step is not None
        return segment_table(ctx.steps or 1, settings.segments, settings.split)[ctx.step]

    def wants(ctx: CallContext) -> bool:
        if ctx.step is None or ctx.steps is None:
            return True
        table = segment_table(ctx.steps, settings.segments, settings.split)
        return (ctx.step - table.index(table[ctx.step])) % settings.every == 0

    def see(q: Tensor, k: Tensor, ctx: CallContext) -> None:
        names = tally.orders(ctx.layer, settings.criterion)
        tally.add_maps(q, k, ctx, names, segment(ctx))

    return Observer(wants, see)


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


def _measuring(settings: Settings) -> dict[str, Any]:
    """The settings that what was added up depends on; masks can be solved for others later."""
    solving = ("budget", "least_mass")
    return {name: value for name, value in settings.to_dict().items() if name not in solving}


def _digest(value: Any) -> str:
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


def _versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
    return {"dit_sparse": dit_sparse.__version__, **found}
