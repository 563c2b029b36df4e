"""The model card of a trained video pipeline, from its training record."""

from __future__ import annotations

from torch import nn

from scripts.training.checkpoint import Checkpoint
from scripts.training.pipeline import Pipeline
from scripts.training.recipe import TEXT_LENGTH

_CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---
# {name}

A small text-to-video model of stock classes: `WanPipeline` with `WanTransformer3DModel`
({transformer:.1f} M parameters), `AutoencoderKLWan` ({vae:.1f} M) and `UMT5EncoderModel`
({text:.1f} M), bf16. It exists so that sparse attention can be tried and measured without a
network: its attention maps are those of a trained model.

    from diffusers import WanPipeline
    pipe = WanPipeline.from_pretrained(folder)
    pipe("a cow nodding", height=128, width=128, num_frames=49, guidance_scale=4.0)

128x128 with 49 frames is {tokens} tokens. Frame counts are odd, sides are multiples of 16.

## Data
Clips composed at training time from animated and still emoji over generated backgrounds, with
generated captions; designs and compositions are held out.

* Fluent emoji, animated and 3-D (npm `@lobehub/fluent-emoji-anim-1` to `-4`,
  `@lobehub/fluent-emoji-3d`): MIT.
* fluent-emoji, fluent-emoji-flat (MIT), noto, noto-v1, fxemoji (Apache-2.0), by npm
  `@iconify/json`.
* Names and groups: npm `openmoji`, CC-BY-SA-4.0.

## Training
Flow matching with logit-normal times shifted towards noise, 10 % empty captions, AdamW, moving
average of the weights; the VAE on L1, edges and a small KL term.

{runs}

## Limits
* It knows emoji, plain motions and plain backgrounds; anything else gives something of that kind.
* English captions of at most {words} tokens; longer ones were never seen in training.
* Trained with the zero padding of the pipeline's default `max_sequence_length=512`; leave it.
"""

_ROW = "| {stage} | {device} | {steps} | {samples} | {minutes} | {loss} | {sizes} |"


def model_card(checkpoint: Checkpoint, pipe: Pipeline) -> str:
    """Markdown: what it is, data and licences, the record of every run, limits."""
    return _CARD.format(
        name=checkpoint.recipe,
        transformer=_millions(pipe.transformer),
        vae=_millions(pipe.vae),
        text=_millions(pipe.text_encoder),
        tokens=checkpoint.models.tokens(49, 128, 128),
        runs=_runs(checkpoint),
        words=TEXT_LENGTH - 2,
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
        lines.append(f"\nHeld-out clips through the VAE: {measured[-1]} dB PSNR.")
    return "\n".join(lines)


def _millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6
