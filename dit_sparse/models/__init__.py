"""The models that come with the package: small pipeline folders of stock diffusers classes.

    pipe = dit_sparse.load("tiny-video")
    pipe("a cow nodding", **dit_sparse.models.get("tiny-video").arguments("cuda"))

Each stands in the folder of its name beside this file, with a model card and a manifest. Nothing
heavy is imported here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dit_sparse.models.manifest import damage

FOLDER = Path(__file__).parent

#: What `dit-sparse sample` uses unless told otherwise.
DEFAULT = "tiny-video"


@dataclass(frozen=True)
class EmbeddedModel:
    """A model of this package.

    Args:
        name: of the model and of its folder.
        call: arguments of the pipeline's call that it was made for.
        without_gpu: others in their place where there is no GPU, so that a sample ends in minutes.
    """

    name: str
    call: Mapping[str, int | float]
    without_gpu: Mapping[str, int | float]

    def arguments(self, device: str) -> dict[str, int | float]:
        """Arguments of the pipeline's call on a kind of device, `"cuda"` or `"cpu"`."""
        return {**self.call, **({} if device == "cuda" else self.without_gpu)}

    @property
    def folder(self) -> Path:
        """Where its files are, or should be."""
        return FOLDER / self.name

    def damage(self, *, digests: bool = False) -> str | None:
        """A sentence about what is wrong with its files, or `None`.

        Args:
            digests: compare the SHA-256 of every file, not only its size.
        """
        found = damage(self.folder, digests=digests)
        if found is None:
            return None
        return (
            f"{found}: the embedded model {self.name!r} is not whole. Install dit-sparse again, "
            "or restore the files of the clone (git status shows them)."
        )


_MODELS = (
    EmbeddedModel(
        "tiny-video",  # 49 frames of 128x128 are 25 x 16 x 16 = 6,400 tokens
        call={
            "num_frames": 49,
            "height": 128,
            "width": 128,
            "num_inference_steps": 30,
            "guidance_scale": 4.0,
        },
        without_gpu={"num_frames": 25, "num_inference_steps": 16},
    ),
    EmbeddedModel(
        "tiny-image",  # 256x256 is 64 x 64 = 4,096 tokens beside the text
        call={"height": 256, "width": 256, "num_inference_steps": 28, "guidance_scale": 3.5},
        without_gpu={"num_inference_steps": 12},
    ),
)


def names() -> list[str]:
    """The embedded models."""
    return [model.name for model in _MODELS]


def get(name: str) -> EmbeddedModel:
    """What is known of an embedded model, whether or not its files are there.

    Raises:
        ValueError: there is no such model.
    """
    for model in _MODELS:
        if model.name == name:
            return model
    near = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"Expected an embedded model ({', '.join(names())}), got {name!r}.{hint}")


def path(name: str) -> Path:
    """The folder of an embedded model: a whole diffusers pipeline.

    Raises:
        ValueError: there is no such model, or a file of it is missing or has another size.
    """
    model = get(name)
    fault = model.damage()
    if fault is not None:
        raise ValueError(fault)
    return model.folder
