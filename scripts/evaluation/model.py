"""A pipeline folder as something that draws clips: text to video, and text to image as clips of one
frame.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_sparse.pipelines.load import load


@dataclass(frozen=True, eq=False)
class Model:
    """A pipeline and how it is sampled from.

    Args:
        pipe: a diffusers pipeline that takes prompts.
        name: what the records call it.
        size: frames, height and width in pixels.
        steps, guidance: of every sample.
        seed: of the first prompt's noise; prompt i has seed + i, whatever the batch.
        batch: prompts at a time.

    Raises:
        ValueError: more than one frame of a pipeline that makes pictures.
    """

    pipe: Any
    name: str
    size: tuple[int, int, int]
    steps: int = 30
    guidance: float = 4.0
    seed: int = 0
    batch: int = 8

    def __post_init__(self) -> None:
        if self.size[0] != 1 and not self._makes_video:
            raise ValueError(
                f"Expected pictures of 1 frame from {type(self.pipe).__name__}, got a size of "
                f"{self.size[0]} frames. Ask for 1xHEIGHTxWIDTH."
            )

    @property
    def device(self) -> torch.device:
        return self.pipe.device

    def sample(self, prompts: Sequence[str]) -> Iterator[np.ndarray]:
        """One clip float `[F, H, W, 3]` from 0 to 1 for each prompt, in order."""
        self.pipe.set_progress_bar_config(disable=True)
        for begin in range(0, len(prompts), self.batch):
            some = list(prompts[begin : begin + self.batch])
            seeds = range(self.seed + begin, self.seed + begin + len(some))
            result = self.pipe(
                some,
                **self.call,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                output_type="np",
            )
            clips = result.frames if self._makes_video else result.images[:, None]
            yield from clips

    def record(self) -> dict[str, Any]:
        """How samples were made, for the lines of a result."""
        return {
            "model": self.name,
            "size": "x".join(map(str, self.size)),
            "steps": self.steps,
            "guidance": self.guidance,
            "seed": self.seed,
        }

    @property
    def _makes_video(self) -> bool:
        return "num_frames" in inspect.signature(type(self.pipe).__call__).parameters

    @property
    def call(self) -> dict[str, Any]:
        """The pipeline's arguments beside the prompt and the noise."""
        frames, height, width = self.size
        call = {
            "height": height,
            "width": width,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
        }
        return call | ({"num_frames": frames} if self._makes_video else {})


def open_pipeline(folder: Path, device: torch.device) -> Any:
    """The pipeline of a folder, in bfloat16 on a GPU and in float32 on a CPU.

    Raises:
        ValueError: the folder holds no pipeline.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"Expected the folder of a diffusers pipeline, got {folder} without a "
            "model_index.json. Write one with `python scripts/train.py export`."
        )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return load(folder, dtype=dtype, device=device, local_files_only=True)


def model_of(arguments: argparse.Namespace) -> Model:
    """The model of a command line with `--model`, `--size` and the other fields as options.

    Raises:
        ValueError: the size is malformed.
    """
    sides = arguments.size.split("x")
    if len(sides) != 3 or not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError(
            f"Expected a size as FRAMESxHEIGHTxWIDTH, such as 49x128x128, got {arguments.size!r}."
        )
    return Model(
        pipe=open_pipeline(arguments.model, torch.device(arguments.device)),
        name=arguments.model.resolve().name,
        size=(int(sides[0]), int(sides[1]), int(sides[2])),
        steps=arguments.steps,
        guidance=arguments.guidance,
        seed=arguments.seed,
        batch=arguments.batch,
    )
