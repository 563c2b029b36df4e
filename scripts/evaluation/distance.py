"""How far sampled frames are from real ones: the Frechet distance of their features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.evaluation.distances import frechet_distance
from dit_sparse.evaluation.features import EXTRACTOR, Extractor
from scripts.evaluation.clips import captions_of, draw, spread_frames, to_video
from scripts.evaluation.model import Model
from scripts.training.source import Source

_BLUR = 4  # how much coarser the pictures are that give the scale of the distance


@dataclass(frozen=True)
class Protocol:
    """What a distance depends on besides the pictures.

    Args:
        clips: of each set.
        per_clip: frames of each clip, evenly spread.
        seed: of the real clips: the prompts come from a draw with this seed, the clips that
            everything is compared with from the next one.
    """

    clips: int
    per_clip: int
    seed: int = 0


def measure_split(
    model: Model, split: str, source: Source, extract: Extractor, protocol: Protocol
) -> Iterator[dict[str, Any]]:
    """Distances of a split's real clips to samples, to other real clips and to blurred ones.

    Samples follow the captions of one draw of real clips, and everything is compared with another
    draw: real clips of the first draw against the second say what distance a perfect model has, and
    the same clips at a quarter of the resolution give a feeling for the scale.
    """
    size, n, seed = model.size, protocol.clips, protocol.seed

    def features(pictures: Tensor) -> Tensor:
        return extract(pictures.flatten(0, 1).to(model.device)).cpu()

    def real(at: int, coarser: int = 1) -> Tensor:
        shown = (spread_frames(v, protocol.per_clip) for v, _ in draw(source, n, size, at))
        return torch.cat([features(_coarse(frames, coarser)) for frames in shown])

    clips = model.sample(captions_of(source, n, size, seed))
    shown = (spread_frames(to_video([clip]), protocol.per_clip) for clip in clips)
    target = real(seed + 1)
    sets = {
        "samples": lambda: torch.cat([features(frames) for frames in shown]),
        "real": lambda: real(seed),
        f"real, {_BLUR} times coarser": lambda: real(seed, _BLUR),
    }
    for name, make in sets.items():
        yield {
            "metric": f"FD-{EXTRACTOR}",
            "split": split,
            "compared": name,
            "value": round(frechet_distance(make(), target), 3),
            "clips": n,
            "frames": len(target),
            "real_seed": seed,
            **model.record(),
        }


def _coarse(frames: Tensor, factor: int) -> Tensor:
    """Frames `[B, F, 3, H, W]` shrunk by a factor and stretched again."""
    if factor == 1:
        return frames
    flat = frames.flatten(0, 1)
    small = F.interpolate(flat, scale_factor=1 / factor, mode="area")
    return F.interpolate(small, flat.shape[-2:], mode="bicubic").clamp(0, 1).view_as(frames)
