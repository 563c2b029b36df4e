"""Tiny random-weight pipelines of every family, built without a network: for tests and dry runs.

They are the stock diffusers classes with a few thousand parameters and no text encoder. Their
pictures mean nothing; that they are the same with and without sparse attention does.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_sparse.pipelines._tiny_image import IMAGE
from dit_sparse.pipelines._tiny_recipe import Recipe
from dit_sparse.pipelines._tiny_video import VIDEO

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


def tiny_names() -> list[str]:
    """The families that have a tiny pipeline, and `"wan2.2"`, Wan with two transformers."""
    return [*VIDEO, *IMAGE]


def tiny_pipeline(family: str, *, seed: int = 0) -> DiffusionPipeline:
    """A stock pipeline of a family with tiny random weights, on the CPU in float32.

    Heads have 16 dimensions. Parameters that a fresh model has at zero are random too, so that
    attention always reaches the output.

    Args:
        family: one of `tiny_names()`.
        seed: of the weights; torch's own random state is left as it was.

    Raises:
        ValueError: there is no such tiny pipeline.
    """
    recipe = _recipe(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return recipe.build()


def tiny_call(
    family: str, pipe: DiffusionPipeline | None = None, *, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of a two-step run of a tiny pipeline: prompt embeddings, size, generator.

    The picture is not square where the model allows it, prompts are padded where the model takes a
    mask, and guidance is on where the pipeline has it. Latents are returned, except by DiT.
    Every call makes a new generator, so runs repeat.

    Args:
        family: one of `tiny_names()`.
        pipe: the pipeline to be called; only its device matters.
        seed: of the embeddings and of the initial noise.
    """
    recipe = _recipe(family)
    source = torch.Generator("cpu").manual_seed(seed)
    device = torch.device("cpu") if pipe is None else pipe.device

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    call = recipe.call(draw)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in call.items()} | {
        "num_inference_steps": 2,
        "generator": torch.Generator("cpu").manual_seed(seed),
        "output_type": recipe.output,
    }


def prompt_embeddings(prompt: str, length: int, dim: int) -> Tensor:
    """A stand-in for a text encoder: each word's embedding is random numbers seeded by the word.

    Equal words get equal embeddings and different prompts differ, on every machine; there is no
    meaning in them. Words beyond `length` are dropped, the rest is filled up with the embedding of
    an empty word.

    Args:
        prompt: any text.
        length: tokens.
        dim: of each token's embedding.

    Returns:
        float32 `[1, length, dim]`, standard normal.
    """
    words = prompt.lower().split()[:length]
    words += [""] * (length - len(words))
    return torch.stack([_word(word, dim) for word in words])[None]


def _word(word: str, dim: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") >> 1
    return torch.randn(dim, generator=torch.Generator("cpu").manual_seed(seed))


def _recipe(family: str) -> Recipe:
    recipes = VIDEO | IMAGE
    if family not in recipes:
        raise ValueError(
            f"Expected a family with a tiny pipeline ({', '.join(recipes)}), got {family!r}. "
            "Add its recipe beside the others."
        )
    return recipes[family]
