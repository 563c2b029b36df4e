"""Reads what a user typed; bad input raises ValueError with a sentence."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

if TYPE_CHECKING:
    import torch

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}


_WORDS: dict[Any, dict[str, Any]] = {
    type(None): {"none": None},
    bool: {"true": True, "false": False},
}


def among(value: str, known: Collection[str], what: str) -> str:
    """The value, if it is known; else a sentence with the nearest known one."""
    if value in known:
        return value
    raise ValueError(
        f"Expected {what} among {', '.join(known)}, got {value!r}.{nearest(value, known)}"
    )


def nearest(value: str, known: Collection[str]) -> str:
    """` Did you mean ...?` with the known value nearest to this one, or nothing."""
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def at_least(value: int | None, low: int, flag: str) -> None:
    """Raises unless the value of `flag` is absent or at least `low`."""
    if value is not None and value < low:
        raise ValueError(f"Expected {flag} of at least {low}, got {value}.")


def value_of(text: str, annotation: Any, name: str) -> Any:
    """Reads the text of an option of this type.

    Tuples are written `3x5x5` or `3,5,5`, tuples of tuples `3x5x5,1x9x9` or `3x5x5+1x9x9`; `none`
    is None where the type allows it.
    """
    kinds = _alternatives(annotation)
    for kind in kinds:
        try:
            return _read(text, kind)
        except ValueError:
            continue
    raise ValueError(
        f"Expected {' or '.join(map(_describe, kinds))} for option {name}, got {text!r}."
    )


def steps_of(text: str, flag: str) -> int | float:
    """Reads a count of steps (`3`) or a fraction of all steps (`0.2`)."""
    try:
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    except ValueError:
        raise ValueError(
            f"Expected {flag} to be a count of steps such as 3 or a fraction such as 0.2, "
            f"got {text!r}."
        ) from None


def layers_of(text: str) -> tuple[int, ...]:
    """Reads layer numbers such as `0,1,30-39,-1`; negative numbers count from the end."""
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(-?\d+)|(\d+)-(\d+)", part.strip())
        if match is None:
            raise ValueError(f"Expected layer numbers such as 0,1,30-39,-1, got {text!r}.")
        single, first, last = match.groups()
        layers.extend([int(single)] if single else range(int(first), int(last) + 1))
    return tuple(layers)


def prompts_of(
    prompts: Sequence[str], file: Path | None, default: str, flag: str = "--prompt-file"
) -> tuple[str, ...]:
    """The prompts given, else the lines of the file that are not blank, else the default."""
    if prompts and file is not None:
        raise ValueError("Expected --prompt or --prompt-file, got both. Leave one out.")
    if file is None:
        if any(not prompt.strip() for prompt in prompts):
            raise ValueError("Expected a prompt with at least one word, got an empty --prompt.")
        return tuple(prompts) or (default,)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"Expected {flag} to be a UTF-8 text file, got {str(file)!r}: {error}."
        ) from error
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise ValueError(f"Expected one prompt a line in {str(file)!r}, got an empty file.")
    return found


def device_of(text: str | None) -> torch.device:
    """The device named, by default the GPU if there is one."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text is None:
        return torch.device("cuda" if gpus else "cpu")
    kind, _, index = text.partition(":")
    among(kind, ("cpu", "cuda"), "--device")
    if kind == "cuda" and not gpus:
        raise ValueError(
            f"Expected a device of this machine, got {text!r}, but PyTorch finds no GPU here. "
            "Use --device cpu, or see `dit-sparse doctor`."
        )
    if index and not (index.isdecimal() and int(index) < max(gpus, 1)):
        raise ValueError(f"Expected a device number below {max(gpus, 1)}, got {text!r}.")
    return torch.device(text)


def dtype_of(text: str | None, device: torch.device) -> torch.dtype:
    """The dtype named, by default bfloat16 on a GPU and float32 on a CPU."""
    import torch

    if text is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if re.match(r"(fp8|float8|int8|fp4|int4|nf4)", text.lower()):
        raise ValueError(
            f"Expected --dtype to be what attention computes in, got {text!r}. Eight bits and "
            "fewer are a property of the weights: give --model a quantised pipeline."
        )
    dtype = getattr(torch, DTYPES[among(text.lower(), DTYPES, "--dtype")])
    if dtype == torch.float16 and device.type == "cpu":
        raise ValueError(
            "Expected float32 or bfloat16 on a CPU, got float16, which needs a GPU. "
            "Use --dtype bfloat16."
        )
    return dtype


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = get_args(annotation)
        # The narrowest first: "2" is an int where int | float is allowed, and anything is a str.
        return tuple(sorted(kinds, key=lambda k: (k is str, k is float, not _nested(k))))
    return (annotation,)


def _read(text: str, kind: Any) -> Any:
    words = _WORDS.get(kind)
    if get_origin(kind) is Literal:
        words = {str(value).lower(): value for value in get_args(kind)}
    if words is not None:
        if text.lower() not in words:
            raise ValueError(text)
        return words[text.lower()]
    if _nested(kind):
        if "+" not in text and not ("," in text and "x" in text):
            raise ValueError(text)
        return tuple(value_of(part, get_args(kind)[0], "") for part in re.split("[,+]", text))
    if get_origin(kind) is tuple:
        return tuple(value_of(part, get_args(kind)[0], "") for part in re.split("[x,]", text))
    return kind(text)


def _nested(kind: Any) -> bool:
    """Whether a type is tuples in a tuple, such as a window for each head."""
    return get_origin(kind) is tuple and get_origin(get_args(kind)[0]) is tuple


def _describe(kind: Any) -> str:
    if _nested(kind):
        return "such numbers for each head, 3x5x5,1x9x9"
    if get_origin(kind) is tuple:
        return "numbers such as 3x5x5"
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    known = {int: "an integer", float: "a number", bool: "true or false", type(None): "none"}
    return known.get(kind, getattr(kind, "__name__", str(kind)))
