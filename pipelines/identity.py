"""Which model a transformer is."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from torch import nn

from dit_sparse.model_identity import ModelIdentity

# What the Hub's cache calls a component's folder: .../models--owner--name/snapshots/commit/part.
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})(?:/|$)")


def identity_of(transformer: nn.Module, name: str | None = None) -> ModelIdentity:
    """Class and configuration of a diffusers transformer, and where it came from.

    Args:
        transformer: of any family.
        name: what to call it; by default its repository on the Hub, or the name of its folder.
    """
    config: Any = getattr(transformer, "config", {})
    values: Mapping[str, Any] = dict(config)
    # Private entries say which version wrote the file and where it lies.
    public = {key: value for key, value in values.items() if not key.startswith("_")}
    text = json.dumps(public, sort_keys=True, default=str)
    source = str(values.get("_name_or_path") or "")
    cached = _CACHED.search(PurePath(source).as_posix())
    revision = None if cached is None else cached[3]
    if name is None and cached is not None:
        name = f"{cached[1]}/{cached[2]}"
    return ModelIdentity(
        kind=type(transformer).__name__,
        config=hashlib.sha256(text.encode()).hexdigest(),
        name=name or PurePath(source).name or None,
        revision=revision,
    )
