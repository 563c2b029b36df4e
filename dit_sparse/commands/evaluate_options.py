"""The options of `dit-sparse evaluate`. Imports of torch wait until the command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dit_sparse.commands.call import (
    Device,
    Dtype,
    Frames,
    Guidance,
    Height,
    NegativePrompt,
    Quiet,
    Steps,
    Width,
)
from dit_sparse.commands.output import Format, sentences, show


def evaluate(
    model: Annotated[
        str | None, typer.Option(help="As for `dit-sparse sample`; the embedded one by default.")
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="name:option=value, several separated by commas, several values by |: "
            "window:density=0.2|0.3,pisa:density=0.2:dense_first=0.2. Repeatable."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of these options; the command line wins.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="One prompt a line; fixed ones by default.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="Of the prompts, take the first so many (4).")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Of the noise, such as 0,1,2.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder; goes on with what is there (evaluation)."),
    ] = None,
    dense_first: Annotated[
        str | None, typer.Option(help="First steps kept dense, where a method does not say.")
    ] = None,
    dense_last: Annotated[str | None, typer.Option(help="Last steps, likewise.")] = None,
    dense_layers: Annotated[str | None, typer.Option(help="Layers, likewise: 0,1,-1.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="Sequence length, likewise.")] = None,
    baselines: Annotated[
        str | None,
        typer.Option(help="Dense variants beside stock: dense,cudnn,flash (all on a GPU); none."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Times that a speed is a median of, at least (5).")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="psnr,ssim,temporal,lpips,features,inception,clip (all).")
    ] = None,
    lpips_weights: Annotated[
        Path | None, typer.Option(help="File of AlexNet's weights, for LPIPS.")
    ] = None,
    inception_weights: Annotated[
        Path | None, typer.Option(help="File of Inception's weights, for FID and KID.")
    ] = None,
    clip_model: Annotated[
        Path | None, typer.Option(help="Folder of a CLIP model, for the CLIP score.")
    ] = None,
    probe_at: Annotated[
        str | None,
        typer.Option(help="Shares of the schedule where calls are looked at (0.1,0.5,0.9); none."),
    ] = None,
    target_psnr: Annotated[
        float | None, typer.Option(help="dB that the recommendation must reach (30).")
    ] = None,
    shown: Annotated[
        int | None, typer.Option(help="Methods whose pictures are in report.html, at most (6).")
    ] = None,
    negative_prompt: NegativePrompt = None,
    steps: Steps = None,
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH, or FRAMESxHEIGHTxWIDTH: 81x480x832.")
    ] = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    guidance: Guidance = None,
    dtype: Dtype = None,
    device: Device = None,
    offload: Annotated[str | None, typer.Option(help="none, model, sequential or group.")] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile blocks, of dense variants too.")
    ] = False,
    merge: Annotated[
        str | None,
        typer.Option(
            help="Folders evaluated apart, each with its own methods: only put them together in "
            "--output. Separated by commas."
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(help="Split the prompts over so many processes, one for each GPU.")
    ] = 1,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no further run after so many; then report.")
    ] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Run methods again that failed before.")
    ] = False,
    quiet: Quiet = False,
    output_format: Format = "text",
) -> None:
    """Measure quality and speed of many methods on a model, and report them."""
    given = {k: v for k, v in locals().items() if v is not None and k not in _HANDLED}
    with sentences(output_format):
        from dit_sparse.commands import evaluate as evaluating
        from dit_sparse.commands.words import prompts_of
        from dit_sparse.evaluation.spec import read_config, spec_of

        if merge is not None:
            _check_merge({**given, "config": config, "prompts": prompts})
            place = Path("evaluation") if output is None else output
            wanted = 30.0 if target_psnr is None else target_psnr
            most = evaluating.SHOWN if shown is None else shown
            merged = evaluating.merge([Path(f) for f in _items(merge)], place, wanted, most)
            show(merged.to_dict(), str(merged), output_format)
            return
        if processes != 1 and not evaluating.launched():
            raise typer.Exit(evaluating.launch(processes, sys.argv[1:]))
        chosen: dict[str, Any] = {} if config is None else read_config(config)
        if prompts is not None:
            chosen["prompts"] = prompts_of((), prompts, "", "--prompts")
        for name in ("seeds", "baselines", "metrics", "probe_at"):
            if name in given:
                given[name] = _items(given[name])
        spec = spec_of({**chosen, **given, "compile": compile or chosen.get("compile", False)})
        report = evaluating.evaluate(spec, retry=retry, quiet=quiet, minutes=minutes)
        if report is not None:
            show(report.to_dict(), str(report), output_format)


_HANDLED = (
    "config",
    "merge",
    "prompts",
    "compile",
    "processes",
    "minutes",
    "retry",
    "quiet",
    "output_format",
)


def _check_merge(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is not None and name not in ("output", "target_psnr", "shown"):
            raise ValueError(
                f"Expected --merge with --output, --target-psnr and --shown alone, got "
                f"--{name.replace('_', '-')}. Nothing is run; leave it out."
            )


def _items(text: str) -> list[str]:
    return [] if text == "none" else [part.strip() for part in text.split(",") if part.strip()]
