"""What a tiny pipeline is made of, as data: diffusers class names, their arguments, and a call."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


class Draw(Protocol):
    """Draws a standard normal float32 tensor of the given shape."""

    def __call__(self, *shape: int) -> Tensor: ...


def mask(length: int, *, real: int) -> Tensor:
    """int64 `[1, length]`: `real` ones, then zeros."""
    return (torch.arange(length) < real).long()[None]


@dataclass(frozen=True)
class Part:
    """A diffusers class by name, and its constructor arguments."""

    cls: str
    config: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        return getattr(importlib.import_module("diffusers"), self.cls)(**self.config)


@dataclass(frozen=True)
class Recipe:
    """A pipeline without text encoders.

    Args:
        pipeline: name of the diffusers pipeline class.
        transformer, vae, scheduler: its parts.
        call: the keyword arguments of a short run, apart from steps, seed and output type.
        also: further components and settings of the pipeline.
        output: what `output_type` a run asks for.
    """

    pipeline: str
    transformer: Part
    vae: Part
    scheduler: Part
    call: Callable[[Draw], dict[str, Any]]
    also: Mapping[str, Any] = field(default_factory=dict)
    output: str = "latent"

    def build(self) -> DiffusionPipeline:
        """The pipeline, with weights from torch's current random state."""
        cls = getattr(importlib.import_module("diffusers"), self.pipeline)
        required = {
            name: None
            for name, p in inspect.signature(cls.__init__).parameters.items()
            if p.default is p.empty and name != "self"
        }
        also = {k: v.build() if isinstance(v, Part) else v for k, v in self.also.items()}
        parts = {
            "transformer": self.transformer.build(),
            "vae": self.vae.build(),
            "scheduler": self.scheduler.build(),
        }
        pipe = cls(**(required | parts | also))
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval()
        for name in ("transformer", "transformer_2"):
            if getattr(pipe, name, None) is not None:
                _fill_zeros(getattr(pipe, name))
        return pipe


def _fill_zeros(module: nn.Module) -> None:
    """Draws the parameters that training would start at zero: a closed gate hides attention."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not bool(parameter.any()):
                parameter.normal_(std=0.2)
