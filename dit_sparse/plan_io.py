"""Plans as files: one safetensors file, the scalars as JSON in its metadata. Never pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dit_sparse.grid import Permutation
from dit_sparse.list_lengths import uneven
from dit_sparse.plan import BlockPlan, Blocks, Pools
from dit_sparse.plan_check import check, tensors
from dit_sparse.predicate import BoxPredicate, DiskPredicate

_KEY = "dit_sparse.plan"
_VERSION = 2
_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "q_size": int,
    "k_size": int,
    "tail": str,
    "guard": (int, type(None)),
    "factors": (list, type(None)),
    "scale": (int, float),
    "tensors": dict,
    "sha256": str,
}
_LISTS = ("q_blocks.starts", "k_blocks.starts", "indices", "offsets", "full", "partial")
_BOX = ("box.lower", "box.upper", "box.above", "box.below")
_DISK = ("disk.centre", "disk.limit", "disk.key")


def save_plan(plan: BlockPlan, path: str | os.PathLike[str]) -> Path:
    """Writes a plan, whole or not at all, and returns the path.

    Raises:
        ValueError: the plan is not well-formed (`plan_check.check`), or has coarse keys.
        OSError: the file cannot be written.
    """
    path = Path(path)
    check(plan)
    if plan.coarse is not None:
        raise ValueError(
            "Expected a plan without coarse keys, got one with. Files have no place for them: make "
            "the plan anew from its method."
        )
    stored, names = _without_copies(plan)
    header: dict[str, Any] = {
        "version": _VERSION,
        "q_size": plan.q_blocks.size,
        "k_size": plan.k_blocks.size,
        "tail": plan.tail,
        "guard": None if plan.box is None else plan.box.guard,
        "factors": None if plan.pools is None else list(plan.pools.factors),
        "scale": plan.scale,
        "tensors": names,
    }
    header["sha256"] = _digest(header, stored)
    data = safetensors.torch.save(stored, metadata={_KEY: json.dumps(header)})
    try:
        replace_file(path, data)
    except OSError as error:
        raise OSError(
            error.errno,
            f"Expected to write a plan, got {error.strerror!r}. Give a file in an existing folder "
            "that you may write to",
            str(path),
        ) from error
    return path


def load_plan(path: str | os.PathLike[str]) -> BlockPlan:
    """Reads a plan that `save_plan` wrote, on the CPU; `plan.to(device)` moves it.

    Raises:
        ValueError: the file is not a plan, is damaged, or was written in another format version.
        OSError: the file cannot be read.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise OSError(
            error.errno,
            f"Expected to read a plan, got {error.strerror!r}. Give a file that save_plan wrote",
            str(path),
        ) from error
    try:
        stored = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"Expected a plan in {path}, got a file that is truncated or not safetensors "
            f"({error}). Write it again with save_plan."
        ) from error
    header = _header(data, path)
    if _digest(header, stored) != header["sha256"]:
        raise ValueError(
            f"Expected in {path} what save_plan wrote, got other contents: the file is damaged. "
            "Write it again with save_plan."
        )
    try:
        plan = check(_plan(header, stored))
    except ValueError as error:
        raise ValueError(
            f"Expected a well-formed plan in {path}. {error} Write it again with save_plan."
        ) from error
    return replace(plan, uneven=uneven(plan.full + plan.partial), lasting=True)


def _without_copies(plan: BlockPlan) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to write, and for every tensor of the plan the name it is stored under."""
    stored: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    seen: list[tuple[Tensor, str]] = []
    for name, tensor in tensors(plan):
        known = next((n for t, n in seen if t is tensor), None)
        names[name] = known or name
        if known is None:
            seen.append((tensor, name))
            # A clone, because safetensors refuses views that share storage.
            stored[name] = tensor.detach().cpu().contiguous().clone()
    return stored, names


def replace_file(path: Path, data: bytes) -> None:
    """Writes beside the path and renames, so that a reader never meets half a file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _digest(header: Mapping[str, Any], stored: Mapping[str, Tensor]) -> str:
    """SHA-256 of everything that the file says, apart from the digest itself."""
    scalars = {name: value for name, value in header.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(scalars, sort_keys=True).encode())
    for name, tensor in sorted(stored.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _header(data: bytes, path: Path) -> Mapping[str, Any]:
    # A safetensors file begins with the length of its JSON header, 8 bytes.
    metadata = (
        json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    )
    if _KEY not in metadata:
        raise ValueError(
            f"Expected a plan in {path}, got a safetensors file of something else. Give a file "
            "that save_plan wrote."
        )
    try:
        header = json.loads(metadata[_KEY])
    except json.JSONDecodeError as error:
        raise ValueError(
            f"Expected JSON in the header of {path}, got {error}. Write it again with save_plan."
        ) from error
    version = header.get("version") if isinstance(header, dict) else None
    if version != _VERSION:
        raise ValueError(
            f"Expected format version {_VERSION} in {path}, got {version!r}. Read it with the "
            "release that wrote it, or make the plan again."
        )
    for field, types in _FIELDS.items():
        if field not in header or not isinstance(header[field], types):
            got = repr(header[field]) if field in header else "none"
            raise ValueError(
                f"Expected the header field {field!r} in {path}, got {got}. Write it again with "
                "save_plan."
            )
    return header


def _plan(header: Mapping[str, Any], stored: Mapping[str, Tensor]) -> BlockPlan:
    found = _named_tensors(header, stored)
    box = None
    if header["guard"] is not None:
        lower, upper, above, below = (found[name] for name in _BOX)
        box = BoxPredicate(lower, upper, above, below, header["guard"])
    pools = None
    if header["factors"] is not None:
        pools = Pools(tuple(header["factors"]), found["pools.counts"])
    return BlockPlan(
        q_blocks=Blocks(found["q_blocks.starts"], header["q_size"]),
        k_blocks=Blocks(found["k_blocks.starts"], header["k_size"]),
        indices=found["indices"],
        offsets=found["offsets"],
        full=found["full"],
        partial=found["partial"],
        box=box,
        bias=found.get("bias"),
        words=found.get("words"),
        disk=DiskPredicate(*(found[name] for name in _DISK)) if _DISK[0] in found else None,
        pools=pools,
        tail=header["tail"],
        hidden=found.get("hidden"),
        order=Permutation(found["order.index"]) if "order.index" in found else None,
        scale=header["scale"],
    )


def _named_tensors(header: Mapping[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = header["tensors"]
    required = {*_LISTS, *(_BOX if header["guard"] is not None else ())}
    if header["factors"] is not None:
        required.add("pools.counts")
    if not names.keys().isdisjoint(_DISK):
        required.update(_DISK)
    for name in sorted(required - set(names)):
        raise ValueError(f"Expected a tensor {name!r}, got none.")
    known = required | {"hidden", "order.index", "bias", "words"}
    for name in sorted(set(names) - known):
        raise ValueError(f"Expected tensors {', '.join(sorted(known))}, got {name!r}.")
    for name, key in names.items():
        if not isinstance(key, str) or key not in stored:
            raise ValueError(f"Expected a tensor {key!r} for {name!r}, got none.")
    return {name: stored[key] for name, key in names.items()}
