"""Distances between two sets of features; a figure without the extractor's name says nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Frechet distance of two sets of features, in float64.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), of means m and covariances C (arXiv 1706.08500,
    eq. 6). The last trace is the sum of the singular values of X Y^T / (N - 1), of centred features
    X and Y: no root of a product that has lost its symmetry to rounding, and quick for few samples.
    Few samples make the distance larger: compare values of equal counts alone.

    Args:
        first, second: `[N, D]`, equally many.

    Raises:
        ValueError: sets of different sizes.
    """
    _check(first, second)
    x, y = first.double().cpu(), second.double().cpu()
    apart = (x.mean(0) - y.mean(0)).square().sum()
    x, y = x - x.mean(0), y - y.mean(0)
    spread = x.square().sum() + y.square().sum()
    if not (apart + spread).isfinite():
        return math.nan  # no singular values would be found
    small = [torch.linalg.qr(z, mode="r").R for z in (x, y)]  # their Gram matrices stay
    shared = torch.linalg.svdvals(small[0] @ small[1].T).sum()
    found = apart + (spread - 2 * shared) / (len(x) - 1)
    return max(float(found), 0.0)  # rounding may leave it just below


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
