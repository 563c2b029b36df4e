"""The processors of a transformer as the dictionary that diffusers' `set_attn_processor` takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dit_sparse.attention import check_backend
from dit_sparse.backend import Precision
from dit_sparse.methods import MethodSpec, parse
from dit_sparse.pipelines.clock import StepClock
from dit_sparse.pipelines.install import attach, installation_of, prepare, transformer_of


class SparseAttnProcessor(dict[str, Any]):
    """Processors for a transformer's own `set_attn_processor`, which takes a dictionary.

        pipe.transformer.set_attn_processor(SparseAttnProcessor(pipe.transformer, "window"))

    Self-attention modules get sparse processors, all others keep the one they have. The method
    takes effect when `set_attn_processor` is called, not before. Steps are told from the
    `timestep` argument, since a transformer does not know its pipeline: `dit_sparse.apply` does.

    Args:
        transformer: of a supported family.
        method: a method, the name of one, or a mapping from layer number or `"default"` to either.
        options: options of a method given by name.
        backend: name of the only attention backend to use; `None` for the best one.
        steps: number of denoising steps, for schedules that count from the end or in fractions.
        precision: what sparse calls multiply in, as for `dit_sparse.apply`.

    Raises:
        ValueError: an unknown transformer, processor, method, option, layer, backend or precision,
            or `steps` that are no count.
    """

    def __init__(
        self,
        transformer: nn.Module,
        method: MethodSpec = "window",
        *,
        options: Mapping[str, Any] | None = None,
        backend: str | None = None,
        steps: int | None = None,
        precision: Precision = "bf16",
    ) -> None:
        check_backend(backend, precision)
        self._transformer = transformer_of(transformer)
        self._clock = StepClock(steps=steps)
        self._attachments = prepare(self._transformer, parse(method, options), backend, precision)
        super().__init__(
            (f"{name}.processor", self._attachments[name].sparse)
            if name in self._attachments
            else (f"{name}.processor", module.get_processor())
            for name, module in self._transformer.named_modules()
            if hasattr(module, "get_processor")
        )

    def pop(self, name: str) -> Any:  # type: ignore[override]
        """The processor of a module; keeps it, unlike a dictionary, so that it can be used again.

        `set_attn_processor` takes processors this way, so here the method takes effect.
        """
        processor = self[name]
        installation = installation_of(self._transformer)
        mine = next(iter(self._attachments.values())).sparse.core.session
        if installation is None or installation.session is not mine:
            attach(self._transformer, self._attachments, self._clock)
        return processor
