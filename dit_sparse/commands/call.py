"""What every command that runs a pipeline lets a user choose of its call."""

from __future__ import annotations

from typing import Annotated, Any, Protocol

import typer

from dit_sparse.commands.words import at_least

Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Height = Annotated[int | None, typer.Option(help="Pixels.")]
Width = Annotated[int | None, typer.Option(help="Pixels.")]
Frames = Annotated[int | None, typer.Option(help="Frames of a video.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What to avoid.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1.")]
Offload = Annotated[str, typer.Option(help="none, model, sequential or group.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


class Chosen(Protocol):
    """A request with the choices; `None` leaves one to the model's pipeline."""

    @property
    def steps(self) -> int | None: ...
    @property
    def height(self) -> int | None: ...
    @property
    def width(self) -> int | None: ...
    @property
    def frames(self) -> int | None: ...
    @property
    def guidance(self) -> float | None: ...


def call_arguments(chosen: Chosen) -> dict[str, Any]:
    """The arguments of a pipeline's call, by its names."""
    return {
        "num_inference_steps": chosen.steps,
        "height": chosen.height,
        "width": chosen.width,
        "num_frames": chosen.frames,
        "guidance_scale": chosen.guidance,
    }


def check_counts(chosen: Chosen) -> None:
    """Raises `ValueError` unless steps, height, width and frames are absent or at least 1."""
    for name in ("steps", "height", "width", "frames"):
        at_least(getattr(chosen, name), 1, f"--{name}")
