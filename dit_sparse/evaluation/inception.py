"""Features of FID and KID: Inception's, from a local file of its weights.

Two files are known, neither of which a package carries: the TorchScript module that StyleGAN's
metrics read (`inception-2015-12-05.pt`), which needs nothing else, and the weights of
torch-fidelity (`weights-inception-2015-12-05-6726825d.pth`), which torchmetrics reads with that
package. Both are the network of the first FID (arXiv 1706.08500), and resize pictures as it did.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_sparse.evaluation.features import Extractor

INCEPTION = "Inception"
_AT_ONCE = 64


def load_inception(path: Path | None, device: torch.device) -> Extractor:
    """The network up to its last average over places: 2048 numbers for a picture of any size.

    Args:
        path: of one of the two files.
        device: where it computes.

    Raises:
        ValueError: there is no such file, it holds something else, or torch-fidelity is missing.
    """
    if path is None:
        raise ValueError(
            "FID and KID need the weights of Inception, and nothing is downloaded. Give the file "
            "with --inception-weights."
        )
    if not path.is_file():
        raise ValueError(f"Expected the weights of Inception in {str(path)!r}, got no such file.")
    features = _script(path, device) or _weights(path, device)

    @torch.inference_mode()
    def extract(pictures: Tensor) -> Tensor:
        parts = []
        for some in pictures.split(_AT_ONCE):
            bytes_ = (some.to(device) * 255).round().to(torch.uint8)
            parts.append(features(bytes_).float())
        return torch.cat(parts)

    return extract


def _script(path: Path, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """The TorchScript module; `None` if the file is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module: Any = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError):  # whatever else it is
        return None
    return lambda pictures: module(pictures, return_features=True)


def _weights(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The network of torch-fidelity with these weights."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # it would be unpickled unchecked
    except Exception as error:  # a damaged file can raise anything
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"Expected the weights of Inception in {str(path)!r}, got another file ({reason})."
        ) from error
    try:
        import torch_fidelity  # noqa: F401  # torchmetrics asks for it at once, in other words
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ImportError as error:
        raise ValueError(
            f"Expected the package torch-fidelity, which reads {path.name!r}, got {error}. Install "
            "it with pip, or give the TorchScript file."
        ) from error
    try:
        network = NoTrainInceptionV3(
            "inception-v3-compat",
            ["2048"],
            feature_extractor_weights_path=str(path),
            antialias=False,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"Expected the weights of Inception in {str(path)!r}, got others ({reason})."
        ) from error
    return network.to(device)
