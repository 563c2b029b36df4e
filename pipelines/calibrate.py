"""Calibrating: the dense pipeline runs a few prompts while its attention maps are measured."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_sparse.calibration import Calibration
from dit_sparse.calibration_solver import Settings, Target, check_target, solve
from dit_sparse.method import CallContext
from dit_sparse.pipelines.identity import identity_of
from dit_sparse.pipelines.observe import (
    Observer,
    Prompt,
    digest_of,
    generations_of,
    origin_of,
    run_all,
    segment_observer,
    transformer_to_observe,
    versions,
)
from dit_sparse.step_segments import segment_table
from dit_sparse.tally import Tally

logger = logging.getLogger("dit_sparse")

PROGRESS = "progress.safetensors"


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
    name, transformer = transformer_to_observe(pipe, component)
    generations = generations_of(pipe, prompts, call or {}, settings.seed)
    identity = identity_of(transformer, model)
    digest = digest_of([*prompts, call or {}])
    kept = origin_of(name, identity, digest) | _measuring(settings)
    path = None if folder is None else Path(folder) / PROGRESS
    tally = Tally(settings.block) if path is None else Tally.load(path, kept)
    if tally.facts is not None:
        check_target(target, tally.facts.grid, settings.block)
    runs = [(_comparing(tally, settings, target), generations[0])]
    runs += [(_adding(tally, settings), generation) for generation in generations]
    run_all(pipe, name, runs, tally, path, kept, progress=progress)
    provenance = {"prompts": digest, "generations": len(prompts), "versions": versions()}
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

    def see(q: Tensor, k: Tensor, ctx: CallContext, segment: int) -> None:
        names = tally.orders(ctx.layer, settings.criterion)
        tally.add_maps(q, k, ctx, names, segment)

    return segment_observer(settings.segments, settings.split, settings.every, see)


def _measuring(settings: Settings) -> dict[str, Any]:
    """The settings that what was added up depends on; masks can be solved for others later."""
    solving = ("budget", "least_mass")
    return {name: value for name, value in settings.to_dict().items() if name not in solving}
