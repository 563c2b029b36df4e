"""bf16 tensors and small files in a few shards, as small as they get without loss.

Half of a bf16 number is nearly noise and half is nearly constant: the exponents of trained weights
take few values. So the two bytes are stored apart (the sign moved to the mantissa), the exponents
compressed: about 11 of 16 bits remain.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

SHARD_BYTES = 15 * 2**20


@dataclass(frozen=True, eq=False)
class Archive:
    """Tensors, restored as bfloat16, and texts by name."""

    tensors: Mapping[str, Tensor]
    texts: Mapping[str, str] = field(default_factory=dict)


def write_shards(archive: Archive, folder: Path, stem: str) -> list[dict[str, Any]]:
    """Writes `stem-0.bin`, `stem-1.bin`, ... of at most `SHARD_BYTES` and returns their index."""
    blob, shards = _pack(archive), []
    for number, start in enumerate(range(0, len(blob), SHARD_BYTES)):
        part = blob[start : start + SHARD_BYTES]
        name = f"{stem}-{number}.bin"
        write_atomic(folder / name, part)
        digest = hashlib.sha256(part).hexdigest()
        shards.append({"name": name, "bytes": len(part), "sha256": digest})
    return shards


def read_shards(folder: Path, shards: list[dict[str, Any]]) -> Archive:
    """The archive of an index.

    Raises:
        ValueError: a shard is missing, short or damaged.
    """
    return _unpack(b"".join(_read(folder / shard["name"], shard) for shard in shards))


def _read(path: Path, shard: dict[str, Any]) -> bytes:
    if not path.is_file():
        raise ValueError(f"Expected the shard {path}, found none. Copy the whole folder.")
    part = path.read_bytes()
    if len(part) != shard["bytes"]:
        raise ValueError(
            f"Expected {shard['bytes']} bytes in {path}, got {len(part)}. "
            "The shard is truncated: copy it again or go back to an older checkpoint."
        )
    if hashlib.sha256(part).hexdigest() != shard["sha256"]:
        raise ValueError(f"Expected the recorded SHA-256 of {path}, got another. Copy it again.")
    return part


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file that is whole or absent, whenever the process dies."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _pack(archive: Archive) -> bytes:
    names = sorted(archive.tensors)
    index = {
        "shapes": {name: list(archive.tensors[name].shape) for name in names},
        "texts": dict(archive.texts),
    }
    flat = [archive.tensors[name].detach().to("cpu", torch.bfloat16).reshape(-1) for name in names]
    bits = torch.cat(flat).view(torch.int16).to(torch.int32) & 0xFFFF
    exponents = ((bits >> 7) & 0xFF).to(torch.uint8)
    fractions = ((bits & 0x7F) | ((bits >> 8) & 0x80)).to(torch.uint8)
    return save(
        {
            "index": _bytes(json.dumps(index).encode()),
            "exponents": _bytes(zlib.compress(exponents.numpy().tobytes(), 6)),
            "fractions": fractions,
        }
    )


def _unpack(blob: bytes) -> Archive:
    stored = load(blob)
    index = json.loads(stored["index"].numpy().tobytes())
    exponents = _bytes(zlib.decompress(stored["exponents"].numpy().tobytes())).to(torch.int32)
    fractions = stored["fractions"].to(torch.int32)
    bits = ((fractions & 0x80) << 8) | (exponents << 7) | (fractions & 0x7F)
    numbers = (bits - ((bits & 0x8000) << 1)).to(torch.int16).view(torch.bfloat16)
    tensors, start = {}, 0
    for name in sorted(index["shapes"]):
        shape = torch.Size(index["shapes"][name])
        tensors[name] = numbers[start : start + shape.numel()].reshape(shape)
        start += shape.numel()
    return Archive(tensors, index["texts"])


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
