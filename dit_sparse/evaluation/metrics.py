"""How far a clip is from the dense one of the same prompt, noise and sampler.

Everything is computed on frames as they are kept, 8 bits a channel, never on lossy files. Nothing
is downloaded: a metric without its weights is a gap with a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_sparse.evaluation.clip_score import clip_scorer
from dit_sparse.evaluation.features import EXTRACTOR, Extractor, load_extractor
from dit_sparse.evaluation.inception import INCEPTION, load_inception
from dit_sparse.evaluation.lpips import load_lpips

NAMES = ("psnr", "ssim", "temporal", "lpips", "features", "inception", "clip")
#: Of these, the ones that look at a clip alone.
ALONE = ("clip",)

_AT_ONCE = 1 << 22  # pixels
_SPREAD = 16  # frames of a clip whose features are kept


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames with what was found out about them.

    Args:
        frames: float32 `[F, 3, H, W]` in 0..1.
        prompt: what was asked for.
        features: float32 `[n, D]` of evenly spread frames, or `None`.
    """

    frames: Tensor
    prompt: str
    features: Tensor | None = None

    @classmethod
    def of(
        cls,
        frames: np.ndarray,
        prompt: str,
        device: torch.device | str = "cpu",
        features: np.ndarray | None = None,
    ) -> Clip:
        """A clip of uint8 frames `[F, H, W, 3]`."""
        pixels = torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float() / 255
        found = None if features is None else torch.from_numpy(features)
        return cls(pixels, prompt, found)


#: From a clip and the dense one to numbers by name: floats, or lists with one for each frame.
Measure = Callable[[Clip, Clip], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Metrics:
    """The metrics that can be computed here.

    Args:
        measures: by name.
        gaps: why others are missing, by name.
        extractors: of features of frames, by name, where they are asked for and can be had.
    """

    measures: dict[str, Measure]
    gaps: dict[str, str]
    extractors: dict[str, Extractor] = field(default_factory=dict)
    unsuited: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        names: Sequence[str],
        device: torch.device,
        lpips_weights: Path | None = None,
        clip_model: str | None = None,
        inception_weights: Path | None = None,
    ) -> Metrics:
        """Loads what metrics need, from files alone.

        Args:
            names: of `NAMES`.
            lpips_weights: file of AlexNet's weights; PyTorch's own cache if absent.
            clip_model: folder of a CLIP model.
            inception_weights: file of Inception's weights.
        """
        loaders: dict[str, Callable[[], Measure]] = {
            "psnr": lambda: psnr,
            "ssim": _ssim,
            "temporal": lambda: temporal,
            "lpips": lambda: _per_frame("lpips", load_lpips(lpips_weights, device)),
            "features": lambda: features,
            "inception": lambda: _of_all_clips,
            "clip": lambda: _clip(clip_model, device),
        }
        networks: dict[str, tuple[str, Callable[[], Extractor]]] = {
            "features": (EXTRACTOR, lambda: load_extractor(device)),
            "inception": (INCEPTION, lambda: load_inception(inception_weights, device)),
        }
        measures, gaps, extractors = {}, {}, {}
        for name in names:
            try:
                measures[name] = loaders[name]()
                if name in networks:
                    extractor, load = networks[name]
                    extractors[extractor] = load()
            except (ImportError, OSError, RuntimeError, ValueError) as error:
                measures.pop(name, None)
                gaps[name] = " ".join(str(error).split())
        return cls(measures, gaps, extractors)

    def features_of(self, clip: Clip) -> dict[str, np.ndarray]:
        """float32 `[n, D]` of evenly spread frames of a clip, ends included, by extractor."""
        count = min(_SPREAD, len(clip.frames))
        shown = torch.linspace(0, len(clip.frames) - 1, count).round().long()
        frames = clip.frames[shown.to(clip.frames.device)]
        return {name: of(frames).cpu().numpy() for name, of in self.extractors.items()}

    def compare(self, clip: Clip, dense: Clip) -> dict[str, Any]:
        """Numbers by name; what does not suit the clip is noted in `unsuited` and left out.

        Raises:
            ValueError: clips of different sizes.
        """
        if clip.frames.shape != dense.frames.shape:
            raise ValueError(
                f"Expected frames like the dense ones, {list(dense.frames.shape)}, got "
                f"{list(clip.frames.shape)}. Compare clips of one size."
            )
        found: dict[str, Any] = {}
        for name, measure in self.measures.items():
            try:
                found |= measure(clip, dense)
            except ValueError as error:
                self.unsuited[name] = str(error)
        return {name: finite(value) for name, value in found.items()}

    def alone(self, clip: Clip) -> dict[str, Any]:
        """Numbers of a clip that need no other."""
        found: dict[str, Any] = {}
        for name in ALONE:
            if name in self.measures:
                found |= self.measures[name](clip, clip)
        return found


def finite(value: Any) -> Any:
    """`None` in place of NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def psnr(clip: Clip, dense: Clip) -> dict[str, Any]:
    """Peak signal-to-noise ratio in dB: of the whole clip's mean square error, and of each frame.

    `None` stands for infinity, where frames are equal; `identical` says whether all are.
    """
    pairs = _a_few_at_a_time(clip, dense)
    errors = torch.cat([(a - b).double().square().mean((1, 2, 3)) for a, b in pairs])
    return {
        "psnr": _decibel(float(errors.mean())),
        "psnr_frames": [_decibel(error) for error in errors.tolist()],
        "identical": not bool(errors.any()),
    }


def temporal(clip: Clip, dense: Clip) -> dict[str, Any]:
    """Statistics of differences between neighbouring frames, without warping; none for pictures.

    `motion` is the mean absolute difference over that of the dense clip: above 1 it flickers,
    below it freezes. `temporal_psnr` is the PSNR in dB of the differences against the dense ones.
    """
    if len(clip.frames) < 2:
        return {}
    sums = torch.zeros(3, dtype=torch.float64, device=clip.frames.device)
    for i in range(1, len(clip.frames)):
        ours = clip.frames[i] - clip.frames[i - 1]
        theirs = dense.frames[i] - dense.frames[i - 1]
        apart = (ours - theirs).double().square()
        sums += torch.stack([theirs.abs().mean(), ours.abs().mean(), apart.mean()])
    moved, motion, error = sums.tolist()  # waits for the device once
    return {
        "temporal_psnr": _decibel(error / (len(clip.frames) - 1)),
        "motion": motion / moved if moved else None,
    }


def features(clip: Clip, dense: Clip) -> dict[str, Any]:
    """Mean cosine distance of features of the same frames."""
    if clip.features is None or dense.features is None:
        raise ValueError("Expected features of both clips, got none of one. Run it again.")
    cosine = torch.nn.functional.cosine_similarity(clip.features, dense.features)
    return {f"cosine_{EXTRACTOR}": max(1 - float(cosine.double().mean()), 0.0)}


def _of_all_clips(clip: Clip, dense: Clip) -> dict[str, Any]:
    return {}  # distances between sets, which the summary computes


def _ssim() -> Measure:
    from torchmetrics.functional.image import structural_similarity_index_measure

    def frames(ours: Tensor, theirs: Tensor) -> Tensor:
        if min(ours.shape[-2:]) < 11:
            raise ValueError("SSIM needs frames of at least 11 pixels a side.")
        # In float32 the variances of flat regions cancel, and equal frames are not quite equal.
        found = structural_similarity_index_measure(
            ours.double(), theirs.double(), data_range=1.0, reduction="none"
        )
        assert isinstance(found, Tensor)  # a tuple would have to be asked for
        return found.reshape(-1)

    return _per_frame("ssim", frames)


def _clip(folder: str | None, device: torch.device) -> Measure:
    score = clip_scorer(folder, device)

    def measure(clip: Clip, dense: Clip) -> dict[str, Any]:
        count = min(_SPREAD, len(clip.frames))
        shown = torch.linspace(0, len(clip.frames) - 1, count).round().long()
        return {"clip_score": score(clip.frames[shown.to(clip.frames.device)], clip.prompt)}

    return measure


def _per_frame(name: str, of: Callable[[Tensor, Tensor], Tensor]) -> Measure:
    def measure(clip: Clip, dense: Clip) -> dict[str, Any]:
        pairs = _a_few_at_a_time(clip, dense)
        values = torch.cat([of(ours, theirs).double().cpu() for ours, theirs in pairs])
        return {name: float(values.mean()), f"{name}_frames": values.tolist()}

    return measure


def _a_few_at_a_time(clip: Clip, dense: Clip) -> Iterator[tuple[Tensor, Tensor]]:
    """The same frames of both, as many as fit into memory beside a model."""
    count = max(1, _AT_ONCE // (clip.frames.shape[-2] * clip.frames.shape[-1]))
    yield from zip(clip.frames.split(count), dense.frames.split(count), strict=True)


def _decibel(error: float) -> float | None:
    return -10 * math.log10(error) if error > 0 else None
