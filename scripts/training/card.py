"""The model card of a trained pipeline, from its training record."""

from __future__ import annotations

from torch import nn

from scripts.training.checkpoint import Checkpoint
from scripts.training.recipe import Pipeline

_CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: {kind}
---
# {name}

{about}

## Data
{data} over generated backgrounds, with generated captions; designs and compositions are held out.

* Fluent emoji, animated and 3-D (npm `@lobehub/fluent-emoji-anim-1` to `-4`,
  `@lobehub/fluent-emoji-3d`): MIT.
* Names and groups: npm `openmoji`, CC-BY-SA-4.0.

## Training
{training}

{runs}

## Limits
{limits}
"""

_ROW = "| {stage} | {device} | {steps} | {samples} | {minutes} | {loss} | {sizes} |"


def model_card(checkpoint: Checkpoint, pipe: Pipeline) -> str:
    """Markdown: what it is, data and licences, the record of every run, limits."""
    card = checkpoint.models.card
    parts = {k: v for k, v in pipe.components.items() if isinstance(v, nn.Module)}
    return _CARD.format(
        kind=card.kind,
        name=checkpoint.recipe,
        about=card.about.format(**{name: _millions(part) for name, part in parts.items()}),
        data=card.data,
        training=card.training,
        runs=_runs(checkpoint),
        limits=card.limits,
    )


def _runs(checkpoint: Checkpoint) -> str:
    lines = [
        "| stage | device | steps | samples | minutes | loss at the end | sizes |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in checkpoint.runs:
        loss = "-" if run.get("loss") is None else f"{run['loss']:.4f}"
        lines.append(_ROW.format(**{**run, "loss": loss, "sizes": ", ".join(run["sizes"])}))
    measured = [run["held_out_psnr_db"] for run in checkpoint.runs if "held_out_psnr_db" in run]
    if measured:
        lines.append(f"\nHeld-out pictures through the VAE: {measured[-1]} dB PSNR.")
    return "\n".join(lines)


def _millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6
