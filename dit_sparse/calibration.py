"""What a calibration found, as an artifact: an order for each head, and block masks.

A folder of two files: `calibration.safetensors` with the orders and the masks, a bit for each pair
of blocks, and `calibration.json` with everything else: the model, the grid, what was asked for and
what was achieved. Text is not part of a mask; it is always read exactly, whatever its length.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dit_sparse.frame import frame_of
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.model_identity import ModelIdentity
from dit_sparse.orders import AXES
from dit_sparse.plan_io import replace_file

TENSORS = "calibration.safetensors"
HEADER = "calibration.json"
_VERSION = 1
_AGAIN = "Calibrate again, or copy the folder whole."


@dataclass(frozen=True, eq=False)
class Calibration:
    """An order for each head and block masks for each segment of the steps.

    Args:
        model: the transformer that it was measured on.
        grid: the picture's tokens.
        block: tokens of a block.
        orders: uint8 `[layers, H]`, numbers in `orders.AXES`.
        segments: the segment of every denoising step.
        masks: per segment that was seen, uint8 `[layers, H, n, ceil(n / 8)]`: bit 7 - j % 8 of byte
            j // 8 says whether a row of picture blocks reads picture block j.
        density: share of the picture's block pairs that is read, fp32 `[segments, layers, H]`.
        kept_mass: share of the softmax mass among picture blocks that was kept, likewise. Heads
            that fell back to dense have the mass that their mask would have kept.
        dense_heads: (segment, layer, head) of those that fell back to reading everything.
        provenance: how it was made; plain values.
    """

    model: ModelIdentity
    grid: TokenGrid
    block: int
    orders: Tensor
    segments: tuple[int, ...]
    masks: Mapping[int, Tensor]
    density: Tensor
    kept_mass: Tensor
    dense_heads: tuple[tuple[int, int, int], ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, heads = self.blocks, tuple(self.orders.shape)
        packed = (*heads, n, -(-n // 8))
        count = max(self.segments, default=-1) + 1
        wrong = [m for m in self.masks.values() if m.shape != packed or m.dtype != torch.uint8]
        if self.orders.ndim != 2 or self.orders.dtype != torch.uint8 or wrong:
            raise ValueError(
                f"Expected uint8 orders [layers, H] and masks {list(packed)}, got "
                f"{self.orders.dtype} {list(self.orders.shape)} and "
                f"{[list(m.shape) for m in wrong]}."
            )
        if int(self.orders.max()) >= len(AXES):
            raise ValueError(f"Expected orders below {len(AXES)}, got {int(self.orders.max())}.")
        if not self.segments or not self.masks or not set(self.masks) <= set(range(count)):
            raise ValueError(
                f"Expected masks for segments among 0 to {count - 1}, got {sorted(self.masks)}."
            )
        for name in ("density", "kept_mass"):
            if getattr(self, name).shape != (count, *heads):
                raise ValueError(
                    f"Expected {name} of {[count, *heads]}, got {list(getattr(self, name).shape)}."
                )

    @property
    def layers(self) -> int:
        return self.orders.shape[0]

    @property
    def heads(self) -> int:
        return self.orders.shape[1]

    @property
    def steps(self) -> int:
        """Denoising steps of the generations that it is for."""
        return len(self.segments)

    @cached_property
    def blocks(self) -> int:
        """Blocks of the picture, n."""
        return frame_of(TokenLayout((self.grid,)), self.block).candidates

    def order_names(self, layer: int) -> tuple[str, ...]:
        """The order of each head of a layer, one of `orders.AXES`."""
        return tuple(AXES[number] for number in self.orders[layer].tolist())

    def mask(self, segment: int, layer: int) -> Tensor:
        """bool `[H, n, n]` on the CPU.

        Raises:
            ValueError: no step of this segment was calibrated.
        """
        self.check_segment(segment)
        return unpack(self.masks[segment][layer], self.blocks)

    def entries(self, segment: int, layer: int) -> int:
        """Pairs of picture blocks that all heads of a layer read."""
        packed = self.masks[segment][layer].numpy().tobytes()
        return int.from_bytes(packed, "little").bit_count()

    def check_segment(self, segment: int) -> None:
        """Refuses a segment without masks.

        Raises:
            ValueError: no step of it was calibrated.
        """
        if segment not in self.masks:
            steps = [i for i, s in enumerate(self.segments) if s == segment]
            raise ValueError(
                f"Expected a step that the calibration has seen, got step {steps[0]} or later in "
                f"its segment {segment}. Keep those steps dense, or calibrate the transformer that "
                "runs them."
            )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Writes both files into a folder, which is made where there is none; returns it.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"orders": self.orders.cpu().contiguous()}
        tensors |= {f"mask.{s}": m.cpu().contiguous() for s, m in self.masks.items()}
        data = safetensors.torch.save(tensors)
        replace_file(folder / TENSORS, data)
        header = self._header() | {"sha256": hashlib.sha256(data).hexdigest()}
        replace_file(folder / HEADER, (json.dumps(header, indent=1) + "\n").encode())
        return folder

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | os.PathLike[str], *, revision: str | None = None
    ) -> Calibration:
        """Reads what `save_pretrained` wrote, from a folder or the Hub.

        Args:
            path_or_id: a folder, or a repository on the Hub such as owner/name.
            revision: branch, tag or commit there.

        Raises:
            ValueError: there is no calibration, or it is damaged, truncated or of another version.
        """
        folder = _folder(os.fspath(path_or_id), revision)
        try:
            header = json.loads((folder / HEADER).read_bytes())
            data = (folder / TENSORS).read_bytes()
        except OSError as error:
            raise ValueError(
                f"Expected a calibration in {str(folder)!r}, got {error.strerror!r} for "
                f"{Path(str(error.filename)).name}. Give a folder that dit-sparse calibrate wrote."
            ) from error
        except ValueError as error:
            raise ValueError(
                f"Expected JSON in {HEADER} of {str(folder)!r}, got {error}: it is truncated or "
                f"something else. {_AGAIN}"
            ) from error
        return cls._of(header, data, folder)

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, revision: str | None = None
    ) -> str:
        """Uploads both files to a model repository, made where there is none; returns its address.

        Args:
            repo_id: such as owner/name.
            private: whether a repository that is made now is.
            revision: branch to upload to.
        """
        from huggingface_hub import HfApi

        hub = HfApi()
        address = hub.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            hub.upload_folder(
                repo_id=repo_id,
                folder_path=self.save_pretrained(folder),
                revision=revision,
                commit_message="Calibration of dit-sparse",
            )
        return str(address)

    def __deepcopy__(self, memo: dict[int, Any]) -> Calibration:
        return self  # nothing in it changes, and masks of a large model are large

    def _header(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "model": self.model.to_dict(),
            "grid": str(self.grid),
            "block": self.block,
            "segments": list(self.segments),
            "density": self.density.tolist(),
            "kept_mass": self.kept_mass.tolist(),
            "dense_heads": [list(place) for place in self.dense_heads],
            "provenance": dict(self.provenance),
        }

    @classmethod
    def _of(cls, header: Any, data: bytes, folder: Path) -> Calibration:
        version = header.get("version") if isinstance(header, dict) else None
        if version != _VERSION:
            raise ValueError(
                f"Expected format version {_VERSION} in {HEADER} of {str(folder)!r}, got "
                f"{version!r}. Read it with the release that wrote it, or calibrate again."
            )
        if hashlib.sha256(data).hexdigest() != header.get("sha256"):
            raise ValueError(
                f"Expected in {TENSORS} of {str(folder)!r} what {HEADER} describes, got "
                f"{len(data)} other bytes: it is truncated or of another calibration. {_AGAIN}"
            )
        try:
            tensors = safetensors.torch.load(data)
            return cls(
                model=ModelIdentity.of_dict(header["model"]),
                grid=TokenGrid.parse(str(header["grid"])),
                block=int(header["block"]),
                orders=tensors.pop("orders"),
                segments=tuple(map(int, header["segments"])),
                masks={int(name.removeprefix("mask.")): m for name, m in tensors.items()},
                density=torch.tensor(header["density"]),
                kept_mass=torch.tensor(header["kept_mass"]),
                dense_heads=tuple((s, layer, h) for s, layer, h in header["dense_heads"]),
                provenance=header["provenance"],
            )
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"Expected a whole calibration in {str(folder)!r}, got one with a fault: {error} "
                f"{_AGAIN}"
            ) from error

    def __str__(self) -> str:
        seen = [self.density[segment].mean().item() for segment in sorted(self.masks)]
        return (
            f"Calibration({self.model}, grid {self.grid}, {self.steps} steps in "
            f"{len(self.density)} segments, {self.layers} layers x {self.heads} heads, "
            f"density {sum(seen) / len(seen):.3f}, {len(self.dense_heads)} dense heads)"
        )


def pack(mask: Tensor) -> Tensor:
    """uint8 `[..., ceil(n / 8)]` of bool `[..., n]`, the first block in the highest bit."""
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    bits = bits.unflatten(-1, (-1, 8)) << torch.arange(7, -1, -1, dtype=torch.uint8)
    return bits.sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, n: int) -> Tensor:
    """bool `[..., n]` of what `pack` gave."""
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> places & 1).flatten(-2)[..., :n].bool()


def _folder(path_or_id: str, revision: str | None) -> Path:
    path = Path(path_or_id)
    if path.is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path_or_id):
        return path
    from huggingface_hub import hf_hub_download

    try:
        found = [hf_hub_download(path_or_id, name, revision=revision) for name in (HEADER, TENSORS)]
    except Exception as error:  # the client's errors have no common class but this
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"Expected an existing folder, or a calibration on the Hub, got {path_or_id!r}: "
            f"{reason}"
        ) from error
    return Path(found[0]).parent
