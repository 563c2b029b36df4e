"""LPIPS (arXiv 1801.03924) with AlexNet, from a local file of its ImageNet weights.

torchmetrics ships the learned weights of the channels, and its own class would download those of
the network.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

_FILE = "alexnet-owt-7be5be79.pth"
_ENDS = (2, 5, 8, 10, 12)  # layers of the network after whose ReLU features are taken
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def load_lpips(
    weights: Path | None, device: torch.device | str = "cpu"
) -> Callable[[Tensor, Tensor], Tensor]:
    """The distance of pictures `[N, 3, H, W]` in 0..1 to others: float32 `[N]`.

    Args:
        weights: file of torchvision's AlexNet; by default the one in PyTorch's cache, if it is
            there.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / _FILE
    if not path.is_file():
        raise ValueError(
            f"LPIPS needs the ImageNet weights of AlexNet ({_FILE}), and nothing is downloaded. "
            "Give the file with --lpips-weights."
        )
    network = _network()
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        prefix = "features."
        network.load_state_dict(
            {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
        )
    except Exception as error:  # a damaged file can raise anything
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"Expected the weights of torchvision's AlexNet in {str(path)!r}, got another file "
            f"({reason})."
        ) from error
    network = network.to(device).eval().requires_grad_(False)
    channels = [c.to(device) for c in _channel_weights()]
    shift, scale = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (_SHIFT, _SCALE))

    @torch.inference_mode()
    def distance(ours: Tensor, theirs: Tensor) -> Tensor:
        total = torch.zeros(len(ours), device=device)
        x, y = ((2 * p.to(device).float() - 1 - shift) / scale for p in (ours, theirs))
        for start, end, weight in zip((0, *_ENDS), _ENDS, channels, strict=False):
            x, y = network[start:end](x), network[start:end](y)
            apart = (_unit(x) - _unit(y)).square()
            total = total + (apart * weight).sum(1).mean((1, 2))
        return total

    return distance


def _network() -> nn.Sequential:
    """The convolutions of AlexNet, with torchvision's numbers for its layers."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


def _channel_weights() -> list[Tensor]:
    """`[1, C, 1, 1]` for each of the five layers, from the installed torchmetrics."""
    import torchmetrics.functional.image as images

    path = Path(images.__file__).parent / "lpips_models" / "alex.pth"
    found = torch.load(path, map_location="cpu", weights_only=True)
    return [found[f"lin{layer}.model.1.weight"] for layer in range(len(_ENDS))]


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()
