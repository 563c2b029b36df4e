"""Stock processors with another attention backend of diffusers, for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from diffusers.models.attention_dispatch import attention_backend
from torch import nn


@contextmanager
def stock_backend(transformers: Sequence[nn.Module], name: str | None) -> Iterator[None]:
    """Makes diffusers prefer an attention backend; nothing stays behind.

    Args:
        transformers: those that are going to run.
        name: such as `"_native_cudnn"`; `None` changes nothing.

    Raises:
        ValueError: a transformer's attention does not ask diffusers for a backend.
    """
    if name is None:
        yield
        return
    for transformer in transformers:
        processors = [getattr(module, "processor", None) for module in transformer.modules()]
        if not any(hasattr(processor, "_attention_backend") for processor in processors):
            raise ValueError(
                f"Expected a transformer whose attention backend can be chosen, got "
                f"{type(transformer).__name__}, which calls PyTorch itself. Leave the dense "
                f"baseline {name!r} out."
            )
    with attention_backend(name):
        yield
