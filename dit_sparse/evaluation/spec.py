"""What an evaluation runs: from a YAML file, from words of the command line, or both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from dit_sparse.commands.call import check_counts
from dit_sparse.commands.words import among, at_least, device_of, dtype_of, nearest
from dit_sparse.evaluation import metrics
from dit_sparse.evaluation.variants import (
    KERNELS,
    SCHEDULE,
    Variant,
    baselines_of,
    variants_of,
)
from dit_sparse.models import DEFAULT

#: Keys of the YAML file, which are the names of the command's options.
KEYS = (
    *("model", "methods", "baselines", "prompts", "count", "seeds", "negative_prompt"),
    *(
        "size",
        "height",
        "width",
        "frames",
        "steps",
        "guidance",
        "dtype",
        "device",
        "offload",
        "compile",
    ),
    *(
        "rounds",
        "metrics",
        "lpips_weights",
        "inception_weights",
        "clip_model",
        "probe_at",
        "target_psnr",
        "shown",
    ),
    *("dense_first", "dense_last", "dense_layers", "min_tokens", "output"),
)
#: Methods whose pictures are on a page if nothing else is asked for.
SHOWN = 6
_WHOLE = ("count", "height", "width", "frames", "steps", "rounds", "shown")
_REAL = ("guidance", "target_psnr")
_LISTS = ("methods", "baselines", "prompts", "seeds", "metrics", "probe_at")


@dataclass(frozen=True)
class Spec:
    """What to run. `None` leaves a choice to the model's pipeline.

    Args:
        model: see `dit_sparse.commands.models.open_model`.
        variants: all of them, stock first.
        prompts: texts, or `None` for the fixed ones that come with the package.
        count: of the prompts, from the first; `None` takes all.
        seeds: of the initial noise: every prompt is run with each.
        output: folder of the results.
        rounds: times that the speed of a variant is a median of, at least.
        metrics: names of `dit_sparse.evaluation.metrics.NAMES`.
        lpips_weights: file of AlexNet's weights.
        inception_weights: file of Inception's weights.
        clip_model: folder of a CLIP model.
        probe_at: shares of the schedule at which attention calls are looked at; none for no probe.
        target_psnr: dB that the recommendation must reach.
        shown: variants whose pictures are on the page.
        compile: compile the transformers' repeated blocks, for dense variants too.
        height, width, frames, steps, guidance, negative_prompt: arguments of the pipeline.
    """

    model: str
    variants: tuple[Variant, ...]
    output: Path
    device: torch.device
    dtype: torch.dtype
    prompts: tuple[str, ...] | None = None
    count: int | None = 4
    seeds: tuple[int, ...] = (0,)
    rounds: int = 5
    metrics: tuple[str, ...] = metrics.NAMES
    lpips_weights: Path | None = None
    inception_weights: Path | None = None
    clip_model: str | None = None
    probe_at: tuple[float, ...] = (0.1, 0.5, 0.9)
    target_psnr: float = 30.0
    shown: int = SHOWN
    compile: bool = False
    offload: str = "none"
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        check_counts(self)
        at_least(self.count, 1, "--count")
        at_least(self.rounds, 0, "--rounds")
        at_least(self.shown, 0, "--shown")
        labels = [variant.label for variant in self.variants]
        twice = {label for label in labels if labels.count(label) > 1}
        if twice:
            raise ValueError(f"Expected each method once, got {min(twice)!r} twice. Drop one.")
        if not self.seeds or any(not 0 <= seed < 2**63 for seed in self.seeds):
            raise ValueError(f"Expected seeds from 0 to 2**63 - 1, got {list(self.seeds)}.")
        if len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"Expected different seeds, got {list(self.seeds)}.")
        for name in self.metrics:
            among(name, metrics.NAMES, "a metric")
        if any(not 0.0 <= share <= 1.0 for share in self.probe_at):
            raise ValueError(f"Expected --probe-at from 0 to 1, got {list(self.probe_at)}.")
        if not math.isfinite(self.target_psnr):
            raise ValueError(f"Expected a finite --target-psnr, got {self.target_psnr}.")
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"Expected a folder for --output, got the file {str(self.output)!r}.")
        if self.prompts is not None and len({*self.prompts}) < len(self.prompts):
            raise ValueError("Expected different prompts, got one of them twice. Drop one.")


def read_config(path: Path) -> dict[str, Any]:
    """The options of a YAML file.

    Raises:
        ValueError: it cannot be read, is no mapping, or has an unknown key.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"Expected --config to be a YAML file, got {str(path)!r}: {error}."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(
            f"Expected option: value lines in {str(path)!r}, got {type(found).__name__}."
        )
    for key in found:
        if key not in KEYS:
            raise ValueError(
                f"Expected options among {', '.join(KEYS)} in {str(path)!r}, got {key!r}."
                f"{nearest(str(key), KEYS)}"
            )
    return {key: _listed(value) if key in _LISTS else value for key, value in found.items()}


def spec_of(given: Mapping[str, Any]) -> Spec:
    """A specification from options by name, those of `KEYS`; absent ones take their defaults.

    Raises:
        ValueError: a value is of another kind than the option's, or out of range.
    """
    given = _with_size(given)
    device = device_of(_text(given, "device"))
    baselines = given.get("baselines")
    if baselines is None:
        baselines = _baselines(device)
    schedule = {k: str(given[k]) for k in SCHEDULE if given.get(k) is not None}
    numbers = {k: _number(given, k, int) for k in _WHOLE if given.get(k) is not None}
    others = {k: _number(given, k, float) for k in _REAL if given.get(k) is not None}
    lists: dict[str, Any] = {}
    for name, kind in (("seeds", int), ("probe_at", float), ("metrics", str), ("prompts", str)):
        if given.get(name) is not None:
            lists[name] = tuple(_item(name, kind, value) for value in given[name])
    return Spec(
        model=_text(given, "model") or DEFAULT,
        variants=(
            *baselines_of([str(name) for name in baselines]),
            *variants_of(given.get("methods") or (), schedule),
        ),
        output=Path(_text(given, "output") or "evaluation"),
        device=device,
        dtype=dtype_of(_text(given, "dtype"), device),
        lpips_weights=_path(given, "lpips_weights"),
        inception_weights=_path(given, "inception_weights"),
        clip_model=_text(given, "clip_model"),
        negative_prompt=_text(given, "negative_prompt"),
        offload=_text(given, "offload") or "none",
        compile=bool(given.get("compile")),
        **numbers,
        **others,
        **lists,
    )


def _with_size(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """`size`, which is HEIGHTxWIDTH or FRAMESxHEIGHTxWIDTH, taken apart."""
    size = given.get("size")
    if size is None:
        return given
    sides = str(size).split("x")
    if len(sides) not in (2, 3) or not all(side.isdecimal() for side in sides):
        raise ValueError(
            f"Expected a size such as 480x832 or 81x480x832 (frames, height, width), got {size!r}."
        )
    found = dict(zip(("width", "height", "frames"), map(int, reversed(sides)), strict=False))
    twice = [name for name in found if given.get(name) is not None]
    if twice:
        raise ValueError(f"Expected --size or --{twice[0]}, got both. Drop one.")
    return {**given, **found}


def _baselines(device: torch.device) -> tuple[str, ...]:
    return ("dense", *KERNELS) if device.type == "cuda" else ("dense",)


def _text(given: Mapping[str, Any], name: str) -> str | None:
    value = given.get(name)
    return None if value is None else str(value)


def _path(given: Mapping[str, Any], name: str) -> Path | None:
    value = _text(given, name)
    return None if value is None else Path(value)


def _number(given: Mapping[str, Any], name: str, kind: type) -> Any:
    return _item(name, kind, given[name])


def _item(name: str, kind: type, value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind is str or whole or (kind is float and isinstance(value, float)):
        return kind(value)
    try:
        return kind(str(value))
    except ValueError:
        raise ValueError(
            f"Expected {'an integer' if kind is int else 'a number'} for {name}, got {value!r}."
        ) from None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
