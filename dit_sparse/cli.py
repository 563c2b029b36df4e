"""The `dit-sparse` command. Declares options only; `dit_sparse/commands/` does the work.

Data goes to stdout, everything else to stderr. Bad input is one sentence on stderr and exit code 2.
Imports of torch wait until a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

import dit_sparse
from dit_sparse import models
from dit_sparse.commands.call import (
    Device,
    Dtype,
    Frames,
    Guidance,
    Height,
    NegativePrompt,
    Offload,
    Quiet,
    Steps,
    Width,
)
from dit_sparse.commands.evaluate_options import evaluate
from dit_sparse.commands.output import Format, sentences, show

DEFAULT_MODEL = models.DEFAULT
DEFAULT_PROMPT = "a cow moving to the right under a light blue sky over green ground"

logger = logging.getLogger("dit_sparse")

app = typer.Typer(
    name="dit-sparse",
    help="Faster diffusion transformers through block-sparse attention.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log details and tracebacks of refused input.")
    ] = False,
) -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s")  # to stderr
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
    if version:
        typer.echo(dit_sparse.__version__)
        raise typer.Exit


@app.command()
def sample(
    model: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(models.names())}, a folder, a hub id, or tiny:<family> "
            "(random weights)."
        ),
    ] = DEFAULT_MODEL,
    prompt: Annotated[list[str] | None, typer.Option(help="What to make; repeatable.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="One prompt a line.")] = None,
    negative_prompt: NegativePrompt = None,
    method: Annotated[str, typer.Option(help="See `dit-sparse methods`.")] = "window",
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the method as key=value; repeatable.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Short for --option density=.")] = None,
    plan: Annotated[
        Path | None, typer.Option(help="A saved plan for this size, in place of a method.")
    ] = None,
    dense_first: Annotated[
        str | None,
        typer.Option(help="First steps kept dense: 3, or 0.2. By default as the family has it."),
    ] = None,
    dense_last: Annotated[str, typer.Option(help="Last steps kept dense: 3, or 0.2.")] = "0",
    dense_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers kept dense: 0,1,30-39; -1 is the last; none. By default as the family "
            "has it."
        ),
    ] = None,
    min_tokens: Annotated[int, typer.Option(help="Dense below this sequence length.")] = 0,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(help="Of the initial noise, for every prompt.")] = 0,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    guidance: Guidance = None,
    dtype: Dtype = None,
    device: Device = None,
    offload: Offload = "none",
    backend: Annotated[str | None, typer.Option(help="Use only this sparse backend.")] = None,
    precision: Annotated[
        str, typer.Option(help="What sparse attention multiplies in: bf16, fp8 or int8.")
    ] = "bf16",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="An .mp4, .gif or .png file.")
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames per second of the file.")] = 16.0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also run dense: speedup and PSNR.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the transformer's blocks.")
    ] = False,
    warmup: Annotated[int, typer.Option(help="Untimed steps before the first result.")] = 1,
    quiet: Quiet = False,
    output_format: Format = "text",
) -> None:
    """Make pictures with a sparse method and print what they cost."""
    with sentences(output_format):
        from dit_sparse.commands import sample as sampling
        from dit_sparse.commands.methods import Wording
        from dit_sparse.commands.words import device_of, dtype_of, prompts_of

        target = device_of(device)
        given = {"dense_first": dense_first, "dense_last": dense_last, "dense_layers": dense_layers}
        schedule = {name: text for name, text in given.items() if text is not None}
        schedule["min_tokens"] = str(min_tokens)
        request = sampling.Request(
            model=model,
            prompts=prompts_of(prompt or [], prompt_file, DEFAULT_PROMPT),
            method=Wording(method, tuple(option or ()), density, plan, schedule),
            output=output,
            device=target,
            dtype=dtype_of(dtype, target),
            negative_prompt=negative_prompt,
            steps=steps,
            seed=seed,
            height=height,
            width=width,
            frames=frames,
            guidance=guidance,
            offload=offload,
            backend=backend,
            precision=precision,  # type: ignore[arg-type]  # it refuses other words
            fps=fps,
            compare=compare,
            compile=compile,
            warmup=warmup,
            quiet=quiet,
        )
        report = sampling.sample(request)
        show(report.to_dict(), str(report), output_format)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="As for `dit-sparse sample --model`.")],
    prompts: Annotated[Path, typer.Option(help="One prompt a line; two are enough.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the result; goes on where it is.")
    ],
    method: Annotated[
        str, typer.Option(help="paro: orders and block masks; sta: windows of each head.")
    ] = "paro",
    density: Annotated[float | None, typer.Option(help="Share of the blocks to read.")] = None,
    mass: Annotated[
        float | None, typer.Option(help="paro: in place of a density: share of the softmax mass.")
    ] = None,
    time: Annotated[
        float | None,
        typer.Option(
            help="sta: in place of a density: share of the time that reading everything takes; "
            "measured on a GPU, estimated elsewhere."
        ),
    ] = None,
    segments: Annotated[
        int, typer.Option(help="Parts of the steps with their own masks or windows.")
    ] = 4,
    split: Annotated[str, typer.Option(help="Of the steps: uniform or halves.")] = "uniform",
    block: Annotated[int, typer.Option(help="Tokens of a block: 64 or 128.")] = 128,
    criterion: Annotated[
        str | None,
        typer.Option(help="paro: of orders: concentration (default), paper, raster."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="paro: what shares a density: layer (default) or head.")
    ] = None,
    least_mass: Annotated[
        float | None,
        typer.Option(
            help="paro: heads that would keep less of their mass stay dense; 0.5 by default."
        ),
    ] = None,
    tile: Annotated[
        str | None, typer.Option(help="sta: tokens of a tile, 6x8x8; by default for the grid.")
    ] = None,
    window: Annotated[
        list[str] | None,
        typer.Option(
            help="sta: a candidate in tiles, 3x3x5; repeatable. By default 1, 3 or all tiles "
            "along each axis."
        ),
    ] = None,
    every: Annotated[int, typer.Option(help="Look at every so many steps.")] = 1,
    component: Annotated[
        str | None, typer.Option(help="Of several transformers: transformer_2.")
    ] = None,
    negative_prompt: NegativePrompt = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; masks hold for them.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first prompt's noise.")] = 0,
    height: Annotated[int | None, typer.Option(help="Pixels; masks hold for this size.")] = None,
    width: Width = None,
    frames: Frames = None,
    guidance: Guidance = None,
    dtype: Dtype = None,
    device: Device = None,
    offload: Offload = "none",
    quiet: Quiet = False,
    output_format: Format = "text",
) -> None:
    """Find what a method decides beforehand: PARO's orders and masks, STA's windows."""
    with sentences(output_format):
        from dit_sparse.commands import calibrate as calibrating
        from dit_sparse.commands.words import device_of, dtype_of, prompts_of, value_of

        sizes = tuple[int, ...]
        windows = tuple(value_of(text, sizes, "--window") for text in window or ())
        edges = None if tile is None else value_of(tile, sizes, "--tile")
        shared = {"segments": segments, "split": split, "block": block, "every": every}
        masks = {"mass": mass, "criterion": criterion, "budget": budget, "least_mass": least_mass}
        job = calibrating.job_of(
            method,
            density=density,
            shared=shared | {"seed": seed},
            of_paro=masks,
            of_sta={"time": time, "tile": edges, "windows": windows or None},
        )
        target = device_of(device)
        report = calibrating.calibrate(
            calibrating.Request(
                model=model,
                job=job,
                prompts=prompts_of((), prompts, "", "--prompts"),
                output=output,
                device=target,
                dtype=dtype_of(dtype, target),
                component=component,
                negative_prompt=negative_prompt,
                steps=steps,
                height=height,
                width=width,
                frames=frames,
                guidance=guidance,
                offload=offload,
                quiet=quiet,
            )
        )
        show(report.to_dict(), str(report), output_format)


@app.command()
def plan(
    grid: Annotated[str, typer.Option(help="Tokens: 21x45x80 (frames x rows x columns) or 64x64.")],
    window: Annotated[
        str | None,
        typer.Option(
            help="Tokens (9x15x24; 80 for all axes), shares of the grid (1.0x0.3x0.3), or auto for "
            "one of the density. One window: plan those of several heads one by one."
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="In place of a window; 0.3 where neither is given."),
    ] = None,
    stride: Annotated[
        str | None, typer.Option(help="Try only this stride: 3x5x8, or 3 for all axes.")
    ] = None,
    dilation: Annotated[
        str, typer.Option(help="Distance of a window's keys: 1x2x2, or 2 for all axes.")
    ] = "1",
    causal: Annotated[
        str, typer.Option(help="Hide what comes later: true, or truexfalsexfalse.")
    ] = "false",
    borders: Annotated[str, typer.Option(help="Of windows: inward or truncated.")] = "inward",
    tile: Annotated[str | None, typer.Option(help="Try only this tile: 3x5x8.")] = None,
    block: Annotated[int, typer.Option(help="Tokens of a block: 64 or 128.")] = 128,
    text: Annotated[int, typer.Option(help="Text tokens in the sequence.")] = 0,
    top: Annotated[int, typer.Option(help="Rows of the table.")] = 10,
    plot: Annotated[Path | None, typer.Option(help="Also draw all candidates here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Short for --format json.")] = False,
    output_format: Format = "text",
) -> None:
    """Count what a window costs on a grid, and pick the tile and stride to run it with."""
    with sentences(output_format):
        from dit_sparse.commands import plan as planning
        from dit_sparse.commands.words import value_of

        sizes, numbers, flags = tuple[int, ...], int | tuple[int, ...], bool | tuple[bool, ...]
        windows = int | tuple[int | float, ...] | Literal["auto"]
        report = planning.plan(
            planning.Request(
                grid=grid,
                window=None if window is None else value_of(window, windows, "window"),
                density=density,
                stride=None if stride is None else value_of(stride, numbers, "--stride"),
                dilation=value_of(dilation, numbers, "--dilation"),
                causal=value_of(causal, flags, "--causal"),
                borders=borders,  # type: ignore[arg-type]  # it refuses other words
                tile=None if tile is None else value_of(tile, sizes, "--tile"),
                block=block,
                text=text,
                top=top,
            )
        )
        if plot is not None:
            planning.plot(report, plot)
        show(report.to_dict(), str(report), "json" if as_json else output_format)


app.command()(evaluate)


@app.command()
def doctor(
    device: Device = None,
    output_format: Format = "text",
) -> None:
    """Say which backends run here (exit code 1 if none does) and whether the models are whole."""
    with sentences(output_format):
        from dit_sparse.commands.words import device_of
        from dit_sparse.doctor import examine

        found = examine(device_of(device))
        show(found.to_dict(), str(found), output_format)
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def methods(
    names: Annotated[
        list[str] | None, typer.Argument(help="Which; all by default.", show_default=False)
    ] = None,
    output_format: Format = "text",
) -> None:
    """List the sparse attention methods and their options."""
    with sentences(output_format):
        from dit_sparse.commands.tables import method_rows, method_text

        rows = method_rows(names or ())
        show(rows, method_text(rows), output_format)


@app.command()
def families(output_format: Format = "text") -> None:
    """List the model families that are supported."""
    with sentences(output_format):
        from dit_sparse.commands.tables import family_rows, family_text

        rows = family_rows()
        show(rows, family_text(rows), output_format)


def main() -> None:
    """Entry point of the `dit-sparse` script."""
    app()
