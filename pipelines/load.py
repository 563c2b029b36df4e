"""Loading a pipeline that has `set_attn_processor`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from diffusers import DiffusionPipeline

from dit_sparse import models
from dit_sparse.backend import Precision
from dit_sparse.methods import MethodSpec
from dit_sparse.pipelines import apply as apply_module


def load(
    path_or_id: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    components: Mapping[str, Any] | None = None,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
) -> Any:
    """Loads a diffusers pipeline and gives it `set_attn_processor(method, ...)`.

        pipe = load("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", dtype=torch.bfloat16, device="cuda")
        pipe.set_attn_processor("window", options={"density": 0.3})

    Args:
        path_or_id: one of `dit_sparse.models.names()`, folder of a saved pipeline (`./name` if a
            model of this package has that name), or an id on the Hub.
        dtype: of the weights. By default float32 for a model of this package; for others what
            diffusers chooses, which may be one for its own parts and another for text encoders.
        device: where to put the pipeline; the CPU by default.
        components: parts to use instead of those in the folder, `None` to leave one out.
        revision, variant, local_files_only: as in `DiffusionPipeline.from_pretrained`.

    Raises:
        OSError: there is no such pipeline.
        ValueError: a file of a model of this package is missing or has another size.
    """
    source = os.fspath(path_or_id)
    if source in models.names():
        source, dtype = str(models.path(source)), dtype or torch.float32
    kept = {"revision": revision, "variant": variant, "dtype": dtype}
    pipe = DiffusionPipeline.from_pretrained(
        source,
        local_files_only=local_files_only,
        **{key: value for key, value in kept.items() if value is not None},
        **(components or {}),
    )
    with_set_attn_processor(pipe)
    return pipe if device is None else pipe.to(device)


def with_set_attn_processor(pipe: Any) -> Any:
    """Gives a pipeline `set_attn_processor`; returns it."""
    if not hasattr(pipe, "set_attn_processor"):
        pipe.__class__ = pipeline_class(type(pipe))  # type: ignore[arg-type]
    return pipe


@cache
def pipeline_class(stock: type) -> type:
    """The stock pipeline class with `set_attn_processor`.

    It keeps the stock name, which `save_pretrained` writes into the files: what is saved is a
    stock pipeline.
    """
    members = {
        "__module__": __name__,
        "__doc__": stock.__doc__,
        "set_attn_processor": _set_attn_processor,
    }
    return type(stock.__name__, (stock,), members)


def _set_attn_processor(
    self: Any,
    method: MethodSpec = "window",
    options: Mapping[str, Any] | None = None,
    *,
    backend: str | None = None,
    steps: int | None = None,
    hoist: bool = True,
    precision: Precision = "bf16",
) -> Any:
    """Makes the pipeline sparse: `dit_sparse.apply` as a method. Returns the pipeline."""
    return apply_module.apply(
        self,
        method,
        options=options,
        backend=backend,
        steps=steps,
        hoist=hoist,
        precision=precision,
    )


def __getattr__(name: str) -> Any:
    stock = getattr(importlib.import_module("diffusers"), name, None)  # unpickling asks for it
    if isinstance(stock, type) and issubclass(stock, DiffusionPipeline):
        return pipeline_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
