"""Opens the model that a command names and finds out what its pipeline takes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from dit_sparse.commands.words import among
from dit_sparse.pipelines.tiny import prompt_embeddings, tiny_call, tiny_names, tiny_pipeline

# To a type checker, diffusers.DiffusionPipeline is the stand-in for a missing torch.
Pipeline: TypeAlias = Any

TINY = "tiny:"

#: Options whose names differ from the call arguments that they become.
FLAGS = {"num_frames": "--frames", "num_inference_steps": "--steps", "guidance_scale": "--guidance"}

# A test's size has too few tokens for anything to be sparse.
_TINY_SCALE = 4
_TINY_STEPS = 8

Conditions = Callable[[str, str | None], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Model:
    """An opened pipeline.

    Args:
        name: as the user wrote it.
        pipeline: a diffusers pipeline.
        conditions: the call arguments that say what to make, from a prompt and a negative prompt.
        defaults: further call arguments, unless the user gives others.
    """

    name: str
    pipeline: Pipeline
    conditions: Conditions
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of the pipeline's call."""
        return inspect.signature(type(self.pipeline).__call__).parameters

    @property
    def makes_video(self) -> bool:
        return "num_frames" in self.parameters

    @property
    def transformers(self) -> tuple[Any, ...]:
        """The denoising transformers, in the order of use."""
        found = (getattr(self.pipeline, name, None) for name in ("transformer", "transformer_2"))
        return tuple(module for module in found if isinstance(module, nn.Module))

    def arguments(
        self, prompt: str, negative: str | None, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Call arguments: the model's defaults under those given that are not `None`.

        Raises:
            ValueError: the pipeline does not take one of them or needs others, or the VAE cannot
                make the size.
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        arguments = {**self.defaults, **chosen, **self.conditions(prompt, negative)}
        title = type(self.pipeline).__name__
        for name in arguments:
            if name not in self.parameters:
                flag = FLAGS.get(name, f"--{name}").replace("_", "-")
                raise ValueError(
                    f"Expected options that {title} takes, got {flag}. Leave it out for this model."
                )
        needed = {
            n
            for n, p in self.parameters.items()
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and n != "self"
        }
        if needed - arguments.keys():
            raise ValueError(
                f"Expected a model that needs only a prompt, got {title}, which also needs "
                f"{', '.join(sorted(needed - arguments.keys()))}. Call it from Python instead."
            )
        check_size(self.pipeline, arguments)
        return arguments


def open_model(
    name: str, *, device: torch.device, dtype: torch.dtype, offload: str = "none"
) -> Model:
    """Opens `tiny:<family>`, a folder that `save_pretrained` wrote, or a hub model id.

    Args:
        name: which model.
        device: where it computes.
        dtype: of its weights.
        offload: `"none"` keeps everything on the device; `"model"`, `"sequential"` and `"group"`
            keep components, single layers or groups of layers on the CPU while they are idle.

    Raises:
        ValueError: there is no such model, it cannot be read, or the CPU is asked to offload.
    """
    among(offload, ("none", "model", "sequential", "group"), "--offload")
    if offload != "none" and device.type == "cpu":
        raise ValueError(
            f"Expected a GPU to offload from, got --offload {offload} on a CPU. Leave it out."
        )
    tiny = name.startswith(TINY)
    model = _tiny(name, device, dtype) if tiny else _published(name, dtype)
    _place(model.pipeline, device, offload)
    return model


def check_size(pipe: Pipeline, arguments: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a height, width or frame count that the VAE cannot make.

    diffusers rounds some of these with a warning; a picture of another size than asked for is a
    wrong result here.
    """
    unit = _pixels_per_token(pipe)
    for axis in ("height", "width"):
        size = arguments.get(axis)
        if size is not None and (size < unit or size % unit):
            raise ValueError(
                f"Expected --{axis} to be a multiple of {unit} for {type(pipe).__name__}, "
                f"got {size}. The nearest is {max(unit, round(size / unit) * unit)}."
            )
    frames, step = arguments.get("num_frames"), _frames_per_latent(pipe)
    if frames is not None and (frames < 1 or (frames - 1) % step):
        raise ValueError(
            f"Expected --frames to be a multiple of {step} plus 1 for {type(pipe).__name__}, "
            f"got {frames}. The nearest is {max(0, round((frames - 1) / step)) * step + 1}."
        )


def _pixels_per_token(pipe: Pipeline) -> int:
    ratio = _first(
        pipe, "vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor"
    )
    patch = getattr(pipe.transformer.config, "patch_size", 1)
    patch = patch[-1] if isinstance(patch, (tuple, list)) else patch
    pack = getattr(pipe, "_pack_latents", None)
    if pack is not None and "patch_size" not in inspect.signature(pack).parameters:
        patch = max(patch, 2)  # Flux and Qwen-Image fold 2x2 latents outside the transformer
    return ratio * patch


def _frames_per_latent(pipe: Pipeline) -> int:
    return _first(pipe, "vae_scale_factor_temporal", "vae_temporal_compression_ratio")


def _first(pipe: Pipeline, *names: str) -> int:
    return next((int(getattr(pipe, name)) for name in names if getattr(pipe, name, None)), 1)


def _tiny(name: str, device: torch.device, dtype: torch.dtype) -> Model:
    family = among(name.removeprefix(TINY), tiny_names(), f"a family after {TINY!r}")
    pipe = tiny_pipeline(family)
    if dtype != torch.float32:  # diffusers warns about every cast
        pipe.to(dtype)
    call = tiny_call(family, pipe)
    tensors = {key: value for key, value in call.items() if isinstance(value, torch.Tensor)}
    kept = call.keys() - tensors.keys() - {"generator", "output_type", "class_labels"}
    defaults = {key: _scaled(key, call[key]) for key in kept}

    def conditions(prompt: str, negative: str | None) -> dict[str, Any]:
        if not tensors:
            return _words(pipe, prompt, negative)
        if negative is not None and not any("negative" in key for key in tensors):
            raise ValueError(
                f"Expected a model that takes --negative-prompt, got {name!r}. Leave it out."
            )
        texts = {key: (negative or "") if "negative" in key else prompt for key in tensors}
        found = {key: _embedding(key, texts[key], value) for key, value in tensors.items()}
        return {
            key: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for key, value in found.items()
        }

    return Model(name, pipe, conditions, defaults | {"num_inference_steps": _TINY_STEPS})


def _scaled(key: str, value: Any) -> Any:
    if key == "num_frames":
        return (value - 1) * _TINY_SCALE + 1
    return value * _TINY_SCALE if key in ("height", "width") else value


def _embedding(key: str, text: str, like: torch.Tensor) -> torch.Tensor:
    if not key.endswith("embeds"):  # a mask
        return like
    length = like.shape[1] if like.ndim == 3 else 1
    embedding = prompt_embeddings(text, length, like.shape[-1])
    return embedding.reshape(like.shape)


def _published(name: str, dtype: torch.dtype) -> Model:
    from dit_sparse.pipelines.load import load

    path = Path(name)
    if path.exists() and not (path / "model_index.json").is_file():
        raise ValueError(
            f"Expected a diffusers pipeline folder with a model_index.json, got {name!r}."
        )
    if not path.exists() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        families = ", ".join(TINY + family for family in tiny_names())
        raise ValueError(
            f"Expected an existing folder, a model id such as owner/name, or one of {families}, "
            f"got {name!r}."
        )
    try:
        pipe = load(name, dtype=dtype, device="cpu")
    except Exception as error:  # a damaged folder can raise anything, and the folder is the input
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"Expected a diffusers pipeline in {name!r}, but it cannot be loaded: {reason}"
        ) from error
    return Model(name, pipe, lambda prompt, negative: _words(pipe, prompt, negative))


def _words(pipe: Pipeline, prompt: str, negative: str | None) -> dict[str, Any]:
    parameters = inspect.signature(type(pipe).__call__).parameters
    if "prompt" not in parameters and "class_labels" in parameters:
        if negative is not None or not prompt.isdecimal():
            raise ValueError(
                f"Expected a class number as --prompt and no --negative-prompt for "
                f"{type(pipe).__name__}, got {prompt!r}."
            )
        return {"class_labels": [int(prompt)]}
    words = {"prompt": prompt}
    if negative is not None:
        words["negative_prompt"] = negative
    return words


def _place(pipe: Pipeline, device: torch.device, offload: str) -> None:
    match offload:
        case "none":
            pipe.to(device)
        case "model":
            pipe.enable_model_cpu_offload(device=device)
        case "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        case "group":
            pipe.enable_group_offload(onload_device=device, offload_type="leaf_level")
