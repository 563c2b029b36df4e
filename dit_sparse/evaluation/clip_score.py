"""CLIP score (arXiv 2104.08718): how well frames fit their prompt, by a local CLIP model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_scorer(
    folder: str | None, device: torch.device | str = "cpu"
) -> Callable[[Tensor, str], float]:
    """The score of pictures `[N, 3, H, W]` in 0..1 and a text: 100 max(cosine, 0), their mean.

    Args:
        folder: of a CLIP model and its tokenizer, as transformers saves them.

    Raises:
        ValueError: no folder is given, or it holds no CLIP model.
    """
    if folder is None:
        raise ValueError(
            "The CLIP score needs a local CLIP model, and nothing is downloaded. Give its folder "
            "with --clip-model."
        )
    if not Path(folder).is_dir():
        raise ValueError(f"Expected the folder of a CLIP model, got {folder!r}.")
    from transformers import AutoTokenizer, CLIPModel

    try:
        model: Any = CLIPModel.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged folder can raise anything
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"Expected a CLIP model in {folder!r}, but it cannot be loaded: {reason}"
        ) from error
    model = model.to(device).eval().requires_grad_(False)
    side = model.config.vision_config.image_size
    longest = model.config.text_config.max_position_embeddings
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (_MEAN, _STD))

    @torch.inference_mode()
    def score(pictures: Tensor, text: str) -> float:
        words = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
        asked = model.text_model(
            input_ids=words["input_ids"].to(device),
            attention_mask=words["attention_mask"].to(device),
        )
        pixels = (_square(pictures.to(device).float(), side) - mean) / std
        seen = model.vision_model(pixel_values=pixels)
        # Not get_image_features: what it returns changed with transformers 5.
        ours = model.visual_projection(seen.pooler_output)
        theirs = model.text_projection(asked.pooler_output)
        return float(100 * F.cosine_similarity(ours, theirs).clamp_min(0).mean())

    return score


def _square(pictures: Tensor, side: int) -> Tensor:
    """Shortest side to `side` pixels, the middle cut out, as CLIP's own preprocessing does."""
    height, width = pictures.shape[-2:]
    ratio = side / min(height, width)
    size = (max(side, round(height * ratio)), max(side, round(width * ratio)))
    small = F.interpolate(pictures, size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return small[..., top : top + side, left : left + side]
