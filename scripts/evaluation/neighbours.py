"""Whether samples repeat what training showed: their nearest training frames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_sparse.evaluation.features import EXTRACTOR, Extractor
from scripts.data.preview import contact_sheet
from scripts.evaluation.clips import captions_of, draw, spread_frames, to_video
from scripts.evaluation.model import Model
from scripts.training.source import Source

SHARES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95)
_PAIRS_IN_A_ROW = 4
_SEED = (
    1 << 20
)  # of the training clips: apart from those of held-out clips, for data without splits


@dataclass(frozen=True, eq=False)
class Frames:
    """Frames with their features, clip by clip.

    Attributes:
        pixels: uint8 `[N, 3, H, W]`.
        features: float32 `[N, D]`.
        per_clip: frames of each clip.
        captions: one for each clip.
    """

    pixels: Tensor
    features: Tensor
    per_clip: int
    captions: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Matches:
    """The frame of each clip that comes nearest to a frame of training.

    Attributes:
        frame, neighbour: int64 `[clips]`, rows of the clips' frames and of those of training.
        distance: float32 `[clips]`, Euclidean between their features.
    """

    frame: Tensor
    neighbour: Tensor
    distance: Tensor


def match(clips: Frames, training: Frames) -> Matches:
    """The nearest training frame of each clip."""
    parts = [torch.cdist(some, training.features).min(1) for some in clips.features.split(256)]
    distance = torch.cat([part.values for part in parts]).view(-1, clips.per_clip)
    neighbour = torch.cat([part.indices for part in parts]).view(-1, clips.per_clip)
    nearest = distance.argmin(1)
    rows = torch.arange(len(nearest))
    return Matches(
        frame=rows * clips.per_clip + nearest,
        neighbour=neighbour[rows, nearest],
        distance=distance[rows, nearest],
    )


def compare(samples: Tensor, real: Tensor) -> dict[str, Any]:
    """Distances `[n]` of samples to training beside those of held-out real clips.

    `nearer_than_5_percent_of_real` is the share of samples nearer to training than the nearest 5 %
    of the held-out real clips: about 0.05 says that samples are no nearer than clips that cannot
    be memorised.
    """
    levels = torch.tensor(SHARES)
    near = float((samples < real.quantile(0.05)).float().mean())
    return {
        "quantiles": list(SHARES),
        "samples": [round(float(value), 4) for value in samples.quantile(levels)],
        "real": [round(float(value), 4) for value in real.quantile(levels)],
        "nearer_than_5_percent_of_real": round(near, 4),
    }


def gather(
    batches: Iterable[tuple[Tensor, Sequence[str]]], per_clip: int, extract: Extractor
) -> Frames:
    """Frames of batches of (clips `[b, 3, F, H, W]` from -1 to 1, captions), on the CPU."""
    pixels, features = [], []
    captions: list[str] = []
    for video, texts in batches:
        frames = spread_frames(video, per_clip)
        features.append(extract(frames.flatten(0, 1)).cpu())
        pixels.append((frames.flatten(0, 1) * 255).round().byte().cpu())
        captions += texts
    return Frames(torch.cat(pixels), torch.cat(features), frames.shape[1], tuple(captions))


def measure(
    model: Model,
    splits: Mapping[str, Source],
    extract: Extractor,
    clips: int,
    training_clips: int,
    per_clip: int,
    seed: int = 0,
) -> tuple[dict[str, Any], list[tuple[Tensor, Tensor, str]]]:
    """The record of the comparison, and the pairs, nearest first.

    Samples follow captions of held-out compositions, which the real clips show too.

    Returns:
        (record, (sampled frame, training frame, caption) for each clip: uint8 `[3, H, W]`).
    """
    held_out, size = splits["compositions"], model.size
    captions = captions_of(held_out, clips, size, seed)
    sampled = (
        (to_video([clip]).to(model.device), [caption])
        for clip, caption in zip(model.sample(captions), captions, strict=True)
    )
    training = gather(draw(splits["train"], training_clips, size, _SEED), per_clip, extract)
    samples = gather(sampled, per_clip, extract)
    real = gather(draw(held_out, clips, size, seed), per_clip, extract)
    found, usual = match(samples, training), match(real, training)
    record = {
        "metric": f"nearest training frame, Euclidean in {EXTRACTOR}",
        **compare(found.distance, usual.distance),
        "clips": clips,
        "training_clips": training_clips,
        "per_clip": samples.per_clip,
        "real_seed": seed,
        **model.record(),
    }
    order = found.distance.argsort().tolist()
    pairs = [
        (
            samples.pixels[found.frame[i]],
            training.pixels[found.neighbour[i]],
            f"{found.distance[i]:.2f} {samples.captions[i]}",
        )
        for i in order
    ]
    return record, pairs


def draw_pairs(pairs: Sequence[tuple[Tensor, Tensor, str]], path: Path) -> None:
    """A picture of pairs: each sampled frame with its nearest training frame on its right."""
    beside = [torch.cat((sampled, training), -1) for sampled, training, _ in pairs]
    pictures = torch.stack(beside).float()[:, :, None] / 127.5 - 1
    contact_sheet(pictures, [text for *_, text in pairs], _PAIRS_IN_A_ROW).save(path, quality=88)
