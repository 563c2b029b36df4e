"""Trains the embedded models, video and image, in boxes of a few minutes that resume.

    python scripts/train.py vae    --data data --out outputs/tiny-video --minutes 4
    python scripts/train.py stills --data data --out outputs/tiny-video --minutes 8
    python scripts/train.py clips  --data data --out outputs/tiny-video --minutes 9
    python scripts/train.py long   --data data --out outputs/tiny-video --minutes 9
    python scripts/train.py export --out outputs/tiny-video --to outputs/tiny-video-pipeline

With `--recipe tiny-image`, the stages are vae, base, large and distil. `--data shapes` needs no
files, and `--recipe toy` or `toy-image` no GPU. A checkpoint folder holds averaged weights in
shards, `checkpoint.json` (the record), `history.jsonl`, `loss.png` and `samples.png`.

Several GPUs of one machine have a process each; with n of them a step learns from n batches:

    torchrun --standalone --nproc-per-node 2 scripts/train.py stills --data data ...
    accelerate launch --multi_gpu --num_processes 2 scripts/train.py stills --data data ...
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a bare checkout

from scripts.training.buckets import parse_buckets
from scripts.training.clock import Clock
from scripts.training.export import export
from scripts.training.loop import Plan
from scripts.training.parts import train_part
from scripts.training.peers import leave
from scripts.training.pipeline import PROMPTS
from scripts.training.recipes import RECIPES
from scripts.training.run import Request
from scripts.training.stage import Stage
from scripts.training.tiny_video import TINY_VIDEO

STARTED = time.monotonic()


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True)
    for name in dict.fromkeys(stage for recipe in RECIPES.values() for stage in recipe.stages):
        _add_stage(commands.add_parser(name))
    shipping = commands.add_parser("export", help="write the pipeline folder that is shipped")
    shipping.add_argument("--out", type=Path, required=True, help="checkpoint folder")
    shipping.add_argument("--to", type=Path, required=True, help="pipeline folder to write")
    shipping.add_argument("--recipe", choices=RECIPES, default=TINY_VIDEO.name)
    return top


def _add_stage(command: argparse.ArgumentParser) -> None:
    command.epilog = "Kinds, sizes, lr, cooldown and shown are the stage's own unless given."
    add = command.add_argument
    add("--data", required=True, help="folder of built training data, or shapes")
    add("--kinds", help="sets of the folder: clips, images or clips,images")
    add("--out", type=Path, required=True, help="checkpoint folder to write")
    add("--resume", type=Path, help="checkpoint folder to go on from, if not --out")
    add("--state", type=Path, help="folder of this machine for an exact resume")
    add("--recipe", choices=RECIPES, default=TINY_VIDEO.name)
    add("--minutes", type=float, required=True, help="training ends then; saving comes after")
    add("--steps", type=int, help="end after so many steps at the latest")
    add("--sizes", help="FRAMESxHEIGHTxWIDTH:BATCH*WEIGHT,...")
    add("--lr", type=float, help="peak learning rate")
    add("--warmup", type=int, default=200, help="steps of this run")
    add("--cooldown", type=float, help="last share of this run")
    add("--uses", type=int, default=8, help="of an example, with another noise each time")
    add("--seed", type=int, default=0)
    add("--save-every", type=float, default=2.0, help="minutes")
    add("--sample-every", type=float, default=4.0, help="minutes")
    add("--log-every", type=int, default=25, help="steps")
    add("--prompts", type=Path, help="a file with a prompt on every line, for the samples")
    add("--shown", help="FRAMESxHEIGHTxWIDTH of samples")
    add("--latents", type=int, help="channels of a new VAE")
    add(
        "--restart-denoiser",
        action="store_true",
        help="leave out the denoiser of the --resume folder",
    )
    add("--compile", action=argparse.BooleanOptionalAction, help="by default where it pays")


def request_of(arguments: argparse.Namespace) -> Request:
    """The request of a stage's command line; raises `ValueError` if something in it is wrong."""
    recipe = RECIPES[arguments.recipe]
    stage = _stage_of(arguments)
    prompts = PROMPTS
    if arguments.prompts is not None:
        prompts = tuple(arguments.prompts.read_text(encoding="utf-8").splitlines())
    shown = stage.shown
    if arguments.shown is not None:
        bucket = parse_buckets(f"{arguments.shown}:1", recipe)[0]
        shown = (bucket.frames, bucket.height, bucket.width)
    cooldown = stage.cooldown if arguments.cooldown is None else arguments.cooldown
    clock = Clock(arguments.minutes, arguments.steps, arguments.warmup, cooldown, STARTED)
    plan = Plan(
        buckets=parse_buckets(arguments.sizes or stage.sizes, recipe),
        lr=stage.lr if arguments.lr is None else arguments.lr,
        clock=clock,
        seed=arguments.seed,
        log_every=arguments.log_every,
        save_every=arguments.save_every,
        sample_every=arguments.sample_every,
    )
    return Request(
        stage=arguments.command,
        data=arguments.data,
        out=arguments.out,
        plan=plan,
        resume=arguments.resume,
        recipe=arguments.recipe,
        kinds=tuple(arguments.kinds.split(",")) if arguments.kinds else stage.kinds,
        prompts=prompts,
        state=arguments.state,
        compile=recipe.compiles and torch.cuda.is_available()
        if arguments.compile is None
        else arguments.compile,
        latents=arguments.latents,
        restart_denoiser=arguments.restart_denoiser,
        shown=shown,
        uses=arguments.uses,
    )


def _stage_of(arguments: argparse.Namespace) -> Stage:
    stages = RECIPES[arguments.recipe].stages
    if arguments.command not in stages:
        raise ValueError(
            f"Expected a stage of {arguments.recipe} ({', '.join(stages)}), got "
            f"{arguments.command}. Name another --recipe."
        )
    return stages[arguments.command]


def main() -> None:
    main_process = os.environ.get("RANK", "0") == "0"
    level = logging.INFO if main_process else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout, force=True)
    top = parser()
    arguments = top.parse_args()
    try:
        if arguments.command == "export":
            print(export(arguments.out, arguments.to, arguments.recipe))
        else:
            train_part(request_of(arguments))
            leave()
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise  # PyTorch's own kinds say too little without their traceback
        top.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
