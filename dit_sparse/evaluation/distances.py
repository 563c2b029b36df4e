"""Distances between two sets of features; a figure without the extractor's name says nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Frechet distance of two sets of features, in float64.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), of means m and covariances C (arXiv 1706.08500,
    eq. 6). Few samples make it larger: compare values of equal counts alone.

    Args:
        first, second: `[N, D]`, equally many.

    Raises:
        ValueError: sets of different sizes.
    """
    _check(first, second)
    from torchmetrics.image.fid import FrechetInceptionDistance

    as_they_are = nn.Identity()
    as_they_are.num_features = first.shape[1]  # type: ignore[assignment]  # torchmetrics reads it
    metric = FrechetInceptionDistance(as_they_are, sync_on_compute=False)  # one process has all
    metric.update(first.double().cpu(), real=True)
    metric.update(second.double().cpu(), real=False)
    return max(float(metric.compute()), 0.0)  # rounding may leave it just below; NaN stays


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, unbiased, in float64.

    What KID (arXiv 1801.01401) is of Inception's features; few samples do not bias it, so that it
    may come out below 0.

    Args:
        first, second: `[N, D]`, equally many.

    Raises:
        ValueError: sets of different sizes.
    """
    _check(first, second)
    x, y = first.double(), second.double()
    n = len(x)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / (n * (n - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def clip_features(frames: Tensor) -> Tensor:
    """Features of clips from those of their frames `[clips, n, D]`: `[clips, 2 D]`.

    Means over frames, and mean absolute changes from frame to frame, so that motion counts: what
    stands in for a video network in a distance between videos.
    """
    change = frames.diff(dim=1).abs().mean(1) if frames.shape[1] > 1 else frames[:, 0] * 0
    return torch.cat([frames.mean(1), change], dim=-1)


def _check(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape or first.ndim != 2 or len(first) < 2:
        raise ValueError(
            f"Expected two sets of equally many features [N, D], got {list(first.shape)} and "
            f"{list(second.shape)}. The distance depends on their number: draw as many of each."
        )
