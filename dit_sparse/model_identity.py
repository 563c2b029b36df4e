"""Which model something was measured on, as far as its configuration tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class ModelIdentity:
    """A transformer by its class and configuration.

    Two sets of weights of one architecture are told apart by their name alone, and a fine-tuned
    model may use what was measured on its base: name and revision are not compared.

    Args:
        kind: name of the transformer's class.
        config: SHA-256 of its configuration.
        name: hub id or folder name, for people.
        revision: commit on the Hub, where it is known.
    """

    kind: str
    config: str
    name: str | None = None
    revision: str | None = None

    def agrees(self, other: ModelIdentity) -> bool:
        return (self.kind, self.config) == (other.kind, other.config)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> ModelIdentity:
        """What `to_dict` gave.

        Raises:
            ValueError: something else.
        """
        known = {"kind", "config", "name", "revision"}
        texts = all(isinstance(values.get(key), str) for key in ("kind", "config"))
        if set(values) != known or not texts:
            raise ValueError(f"Expected a model with {', '.join(sorted(known))}, got {values!r}.")
        return cls(**values)

    def __str__(self) -> str:
        named = f" {self.name}" if self.name else ""
        return f"{self.kind}{named} (config {self.config[:8]})"


@runtime_checkable
class OfOneModel(Protocol):
    """A method that was made for one model."""

    def check_model(self, model: ModelIdentity) -> None:
        """Raises `ValueError` for any other model."""
        ...
