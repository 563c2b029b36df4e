"""Opens the model that a command names and finds out what its pipeline takes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from dit_sparse import models
from dit_sparse.commands.limits import check_size, check_text
from dit_sparse.commands.words import among, nearest
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
        full: those of the defaults that would be others on a GPU, as they would be there.
    """

    name: str
    pipeline: Pipeline
    conditions: Conditions
    defaults: Mapping[str, Any] = field(default_factory=dict)
    full: Mapping[str, Any] = field(default_factory=dict)

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
            ValueError: the pipeline does not take one of them or needs others, cannot make the
                size, or would cut the prompt.
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        arguments = {**self.defaults, **chosen, **self.conditions(prompt, negative)}
        title = type(self.pipeline).__name__
        for name in arguments:
            if name not in self.parameters:
                size = ", or three numbers in --size" if name == "num_frames" else ""
                raise ValueError(
                    f"Expected options that {title} takes, got {_flag(name)}{size}. Leave it out "
                    "for this model."
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
        for name in ("prompt", "negative_prompt"):
            if name in arguments:
                check_text(self.pipeline, arguments[name], _flag(name))
        return arguments

    def reduction(self, given: Mapping[str, Any]) -> str | None:
        """A sentence that says which defaults are lower than on a GPU; `None` if none is used."""
        lower = [name for name in self.full if given.get(name) is None]
        if not lower:
            return None
        flags = [_flag(name) for name in lower]
        here = [f"{self.defaults[n]} {f.lstrip('-')}" for n, f in zip(lower, flags, strict=True)]
        there = [str(self.full[name]) for name in lower]
        change = "changes" if len(flags) == 1 else "change"
        return (
            f"On the CPU: {' and '.join(here)} instead of {' and '.join(there)}; "
            f"{' and '.join(flags)} {change} that."
        )


def open_model(
    name: str, *, device: torch.device, dtype: torch.dtype, offload: str = "none"
) -> Model:
    """Opens an embedded model, `tiny:<family>`, a `save_pretrained` folder, or a hub model id.

    The name of an embedded model means that model; `./name` is a folder of the same name.

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
    if name in models.names():
        model = _embedded(models.get(name), device, dtype)
    elif name.startswith(TINY):
        model = _tiny(name, device, dtype)
    else:
        model = _published(name, dtype)
    _place(model.pipeline, device, offload)
    return model


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


def _embedded(model: models.EmbeddedModel, device: torch.device, dtype: torch.dtype) -> Model:
    opened = _load(model.name, str(models.path(model.name)), dtype)
    reduced = {} if device.type == "cuda" else model.without_gpu
    full = {name: model.call[name] for name in reduced}
    return replace(opened, defaults=model.arguments(device.type), full=full)


def _published(name: str, dtype: torch.dtype) -> Model:
    path = Path(name)
    if path.exists() and not (path / "model_index.json").is_file():
        raise ValueError(
            f"Expected a diffusers pipeline folder with a model_index.json, got {name!r}."
        )
    if not path.exists() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        known = [*models.names(), *(TINY + family for family in tiny_names())]
        raise ValueError(
            f"Expected an existing folder, a model id such as owner/name, or one of "
            f"{', '.join(known)}, got {name!r}.{nearest(name, known)}"
        )
    return _load(name, name, dtype)


def _load(name: str, source: str, dtype: torch.dtype) -> Model:
    from dit_sparse.pipelines.load import load

    try:
        pipe = load(source, dtype=dtype, device="cpu")
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


def _flag(name: str) -> str:
    """The option that becomes a call argument."""
    return FLAGS.get(name, f"--{name}").replace("_", "-")
