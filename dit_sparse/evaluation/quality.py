"""What the clips of a variant say together: means, the worst ones, distances between sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from dit_sparse.evaluation.distances import clip_features, frechet_distance, kernel_distance
from dit_sparse.evaluation.features import EXTRACTOR
from dit_sparse.evaluation.inception import INCEPTION
from dit_sparse.evaluation.metrics import finite
from dit_sparse.evaluation.store import Line, Store, Task
from dit_sparse.evaluation.variants import STOCK


def metrics_of(lines: Sequence[Line]) -> dict[tuple[str, Task], dict[str, Any]]:
    """The numbers of every clip, those added later too."""
    found: dict[tuple[str, Task], dict[str, Any]] = {}
    for line in lines:
        if line["kind"] in ("clip", "metrics") and line["status"] == "ok":
            key = (line["variant"], Task(line["prompt"], line["seed"]))
            found.setdefault(key, {}).update(line["metrics"])
    return found


def means_and_worst(
    clips: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, float | None], dict[str, float]]:
    """Means over clips, and the worst PSNR and SSIM; infinite PSNRs are left out of both."""
    names = dict.fromkeys(
        name
        for clip in clips
        for name, value in clip.items()
        if not isinstance(value, (list, bool))
    )
    means: dict[str, float | None] = {}
    for name in names:
        values = [clip[name] for clip in clips if clip.get(name) is not None]
        means[name] = fmean(values) if values else None
    worst = {
        name: min(clip[name] for clip in clips if clip.get(name) is not None)
        for name in ("psnr", "ssim")
        if means.get(name) is not None
    }
    return means, worst


def set_distances(store: Store, label: str, tasks: Sequence[Task]) -> dict[str, float | None]:
    """Distances of all clips of a variant to the dense clips of the same prompts and seeds."""
    if label == STOCK or len(tasks) < 2:
        return {}
    found: dict[str, float | None] = {}
    for extractor in (EXTRACTOR, INCEPTION):
        pair = _features(store, label, tasks, extractor)
        if pair is None:
            continue
        ours, dense = (side.flatten(0, 1) for side in pair)
        frechet, kernel = frechet_distance(ours, dense), kernel_distance(ours, dense)
        if extractor == INCEPTION:
            found |= {"FID": finite(frechet), "KID": finite(kernel)}
            continue
        found |= {f"FD_{extractor}": finite(frechet), f"KD_{extractor}": finite(kernel)}
        if pair[0].shape[1] > 1:  # of pictures it would be another KD
            video = kernel_distance(*(clip_features(side) for side in pair))
            found[f"video_KD_{extractor}"] = finite(video)
    return found


def _features(
    store: Store, label: str, tasks: Sequence[Task], extractor: str
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`[clips, n, D]` of a variant and of the dense clips; `None` if some are missing."""
    pairs = []
    for task in tasks:
        paths = [store.feature_path(name, task, extractor) for name in (label, STOCK)]
        both = [store.read_array(path) for path in paths]
        if both[0] is None or both[1] is None:
            return None
        pairs.append([torch.from_numpy(x) for x in both])
    ours, dense = (torch.stack(side) for side in zip(*pairs, strict=True))
    return ours, dense
