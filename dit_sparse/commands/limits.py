"""What a pipeline cannot make as asked, found before it is run.

diffusers rounds some sizes and cuts long prompts with a warning or without one; a picture of
something else than asked for is a wrong result here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from dit_sparse.pipelines.family import family_of

# To a type checker, diffusers.DiffusionPipeline is the stand-in for a missing torch.
Pipeline: TypeAlias = Any


def check_size(pipe: Pipeline, arguments: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a height, width or frame count that the pipeline cannot make."""
    title, unit = type(pipe).__name__, _pixels_per_token(pipe)
    for axis in ("height", "width"):
        size = arguments.get(axis)
        if size is not None and (size < unit or size % unit):
            below = size // unit * unit
            raise ValueError(
                f"Expected --{axis} to be a multiple of {unit} for {title}, got {size}. "
                f"Use {_either(below, below + unit)}."
            )
    frames, step = arguments.get("num_frames"), _frames_per_latent(pipe)
    if frames is not None and (frames < 1 or (frames - 1) % step):
        below = (frames - 1) // step * step + 1
        raise ValueError(
            f"Expected --frames to be a multiple of {step} plus 1 for {title}, got {frames}. "
            f"Use {_either(below, below + step)}."
        )


def check_text(pipe: Pipeline, text: str, flag: str) -> None:
    """Raises `ValueError` for a prompt that is too long for every tokenizer of the pipeline.

    Several tokenizers usually differ: what CLIP cuts after 77 tokens, and diffusers then warns
    about, T5 still reads.
    """
    tokenizers = [
        part
        for name, part in pipe.components.items()
        if name.startswith("tokenizer") and hasattr(part, "num_special_tokens_to_add")
    ]
    excess = [(limit, count) for limit, count in (_reads(pipe, t, text) for t in tokenizers)]
    if excess and all(count > limit for limit, count in excess):
        limit, count = max(excess)
        raise ValueError(
            f"Expected {flag} of at most {limit} tokens for {type(pipe).__name__}, got {count}. "
            "Shorten it."
        )


def _reads(pipe: Pipeline, tokenizer: Any, text: str) -> tuple[int, int]:
    """How many tokens of a text the pipeline reads at most, and how many this text has."""
    longest = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    limit = tokenizer.model_max_length
    if longest is not None and isinstance(longest.default, int):
        limit = min(limit, longest.default)
    around = tokenizer.num_special_tokens_to_add()
    # Without `verbose=False`, transformers logs what the caller is about to say.
    count = len(tokenizer(text, verbose=False)["input_ids"])
    return limit - around, count - around


def _either(below: int, above: int) -> str:
    return f"{below} or {above}" if below > 0 else str(above)


def _pixels_per_token(pipe: Pipeline) -> int:
    ratio = _first(
        pipe, "vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor"
    )
    patch = getattr(pipe.transformer.config, "patch_size", 1)
    patch = patch[-1] if isinstance(patch, (tuple, list)) else patch
    pack = getattr(pipe, "_pack_latents", None)
    if pack is not None and "patch_size" not in inspect.signature(pack).parameters:
        patch = max(patch, 2)  # Flux and Qwen-Image fold 2x2 latents outside the transformer
    return math.lcm(ratio * patch, family_of(pipe.transformer).side)


def _frames_per_latent(pipe: Pipeline) -> int:
    return _first(pipe, "vae_scale_factor_temporal", "vae_temporal_compression_ratio")


def _first(pipe: Pipeline, *names: str) -> int:
    return next((int(getattr(pipe, name)) for name in names if getattr(pipe, name, None)), 1)
