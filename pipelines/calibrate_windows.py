"""Searching windows for every head: the dense pipeline runs while candidates are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_sparse.method import CallContext
from dit_sparse.pipelines.identity import identity_of
from dit_sparse.pipelines.observe import (
    Prompt,
    digest_of,
    generations_of,
    origin_of,
    run_all,
    segment_observer,
    transformer_to_observe,
    versions,
)
from dit_sparse.window_table import WindowTable
from dit_sparse.window_tally import WindowBudget, WindowSettings, WindowTally

PROGRESS = "window_progress.safetensors"


def calibrate_windows(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    density: float | None = None,
    time: float | None = None,
    settings: WindowSettings | None = None,
    call: Mapping[str, Any] | None = None,
    component: str | None = None,
    model: str | None = None,
    folder: Path | str | None = None,
    progress: bool = True,
) -> WindowTable:
    """Finds a sliding-tile window for each head and segment of the steps (arXiv 2502.04507).

    In every call that is looked at, all candidates are compared with dense attention; the
    generation itself stays dense. Then all heads share the budget; see `window_search.choose`.

        found = calibrate_windows(pipe, ["a cat", "a street"], density=0.3, folder="cat")
        save_table(found, "cat/windows.json")
        dit_sparse.apply(pipe, "sta", options={"table": "cat"})

    Args:
        pipe: a pipeline without a method.
        prompts: texts, or call arguments that take the place of one, such as prompt embeddings.
        density, time: the budget, one of the two; see `WindowBudget`.
        settings: how to search; see `WindowSettings`.
        call: further arguments of the pipeline: height, width, num_inference_steps. Windows hold
            for this size and, with several segments, number of steps alone.
        component: name of the transformer, for a pipeline with several.
        model: what to call the model in the result.
        folder: where finished generations are kept, so that an interrupted search goes on; the
            file is deleted at the end. `None` keeps nothing.
        progress: show a progress bar.

    Returns:
        The table, which is not saved yet. Its provenance says what every candidate costs, and
        whether that was measured.

    Raises:
        ValueError: no prompt, a budget out of reach, a pipeline that is sparse already, settings
            that differ from those of an interrupted search, or attention that was not seen.
    """
    settings, budget = settings or WindowSettings(), WindowBudget(density, time)
    name, transformer = transformer_to_observe(pipe, component)
    generations = generations_of(pipe, prompts, call or {}, settings.seed)
    identity, digest = identity_of(transformer, model), digest_of([*prompts, call or {}])
    kept = origin_of(name, identity, digest) | settings.to_dict()
    path = None if folder is None else Path(folder) / PROGRESS
    tally = WindowTally(settings) if path is None else WindowTally.load(path, kept, settings)

    def see(q: Tensor, k: Tensor, ctx: CallContext, segment: int) -> None:
        tally.add(q, k, ctx, segment)

    observer = segment_observer(settings.segments, settings.split, settings.every, see)
    runs = [(observer, generation) for generation in generations]
    run_all(pipe, name, runs, tally, path, kept, progress=progress)
    provenance = {"prompts": digest, "generations": len(prompts), "versions": versions()}
    table = tally.table(budget, identity, provenance)
    if path is not None:
        path.unlink(missing_ok=True)
    return table
