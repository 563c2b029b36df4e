"""One run of a stage: from a checkpoint folder, through the box, to a checkpoint folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from scripts.training import compilation
from scripts.training.archive import Archive
from scripts.training.checkpoint import (
    Checkpoint,
    copy_checkpoint,
    open_checkpoint,
    save_part,
    write_manifest,
)
from scripts.training.ema import Average
from scripts.training.history import History
from scripts.training.loop import Hooks, Plan, Task, train
from scripts.training.peers import PATIENCE, Peers, join
from scripts.training.pipeline import PROMPTS
from scripts.training.recipes import RECIPES
from scripts.training.stage import Stage
from scripts.training.state import Trained, read_state, write_state
from scripts.training.tiny_video import TINY_VIDEO
from scripts.training.weights import load_weights, weights

logger = logging.getLogger("train")

#: What was compiled, for the next run on such a device.
CACHE = "compiled.bin"

#: Draws a picture of an averaged model into a file.
Sample: TypeAlias = Callable[[Any, Path], None]


@dataclass(frozen=True)
class Request:
    """What to train.

    Args:
        stage: a stage of the recipe.
        data: see `source.open_data`.
        out: checkpoint folder to write.
        plan: how to train.
        resume: checkpoint folder to go on from; `None` for `out`.
        recipe: name of the recipe.
        kinds: sets of sprites.
        prompts: of the sample pictures.
        state: folder on this machine for the exact state, or `None`.
        compile: the transformer's blocks.
        latents: channels of a new VAE, `None` for the recipe's.
        shown: frames, height and width of the samples.
        restart_denoiser: leaves out the denoiser of `resume`, which must not be `out`.
        uses: how often the denoiser learns from an example, see `replay.Replay`.
    """

    stage: str
    data: str
    out: Path
    plan: Plan
    resume: Path | None = None
    recipe: str = TINY_VIDEO.name
    kinds: Sequence[str] = ("clips",)
    prompts: Sequence[str] = PROMPTS
    state: Path | None = None
    compile: bool = False
    latents: int | None = None
    shown: tuple[int, int, int] = (9, 128, 128)
    restart_denoiser: bool = False
    uses: int = 1

    @property
    def settings(self) -> Stage:
        return RECIPES[self.recipe].stages[self.stage]


@dataclass
class Run:
    """A run under way.

    Args:
        request: what was asked for.
        accelerator: an `accelerate.Accelerator`.
        peers: its processes.
        checkpoint: replaced whenever a part is saved.
        texts: stored with the weights.
    """

    request: Request
    accelerator: Any
    peers: Peers
    checkpoint: Checkpoint
    texts: dict[str, str] = field(default_factory=dict)

    @property
    def part(self) -> str:
        return self.request.settings.part

    @property
    def out(self) -> Path:
        return self.request.out

    @property
    def state(self) -> Path | None:
        folder = self.request.state
        return None if folder is None else folder / f"{self.part}.pt"

    @property
    def key(self) -> str:
        """Tells the present weights of the part from all others."""
        return self.checkpoint.parts[self.part][0]["sha256"]

    def train(
        self, model: Any, task: Task, sample: Sample, ready: Callable[[Any], None]
    ) -> tuple[Any, dict[str, Any]]:
        """Trains a fresh model, or goes on from the checkpoint, and returns its average.

        Args:
            model: of the recipe's shapes; its weights are replaced if the checkpoint has some.
            task: what it learns.
            sample: draws a picture.
            ready: changes how the model computes, not what its average computes.
        """
        step = self.checkpoint.steps.get(self.part, 0)
        if step:
            archive = self.checkpoint.read(self.request.resume or self.out, self.part)
            load_weights(model, archive.tensors)
        model.to(self.peers.device)
        self.peers.align(model)
        average = Average(model)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=self.request.plan.lr,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=self.peers.device.type == "cuda",
        )
        trained = Trained(model, average, optimizer)
        plan = self.request.plan
        if step and self.state is not None and read_state(self.state, trained, self.key) == step:
            logger.info("exact state of step %d found", step)
            plan = replace(plan, clock=replace(plan.clock, warmup=0))
        ready(model)
        # No more than autocast: gradients are averaged in the step, where a CUDA graph records it.
        prepared = self.accelerator.prepare_model(model, evaluation_mode=True)
        logger.info("%s: from step %d", self.request.stage, step)
        hooks = self._hooks(trained, sample)
        record = train(self.peers, prepared, trained, task, plan, hooks, step)
        return average.model, record

    def _hooks(self, trained: Trained, sample: Sample) -> Hooks:
        history = History(self.out)
        main = self.peers.main

        def log(line: dict[str, Any]) -> None:
            if main:
                history.append({"stage": self.request.stage, "part": self.part, **line})
                logger.info(
                    "step %d  loss %.4f  %.0f samples/s  %.2f min",
                    *(line[k] for k in ("step", "loss", "samples_per_second", "minutes")),
                )

        def save(step: int) -> None:
            if main:
                archive = Archive(weights(trained.average.model), self.texts)
                self.checkpoint = save_part(self.checkpoint, self.out, self.part, archive, step)
                if self.state is not None:
                    write_state(self.state, trained, step, self.key)

        def draw(step: int) -> None:
            if main:
                sample(trained.average.model, self.out / "samples.png")
                history.plot(self.out / "loss.png")

        return Hooks(log, save, draw)

    def finish(self, record: dict[str, Any]) -> None:
        """Adds the run's record to the manifest, and keeps what was compiled."""
        if not self.peers.main:
            return
        device = self.peers.device
        name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
        run = {
            "stage": self.request.stage,
            "device": name,
            "processes": self.peers.count,
            "torch": torch.__version__,
            "sizes": [str(bucket) for bucket in self.request.plan.buckets],
            "lr": self.request.plan.lr,
            "seed": self.request.plan.seed,
            "uses": self.request.uses,
            **record,
        }
        self.checkpoint = replace(self.checkpoint, runs=(*self.checkpoint.runs, run))
        write_manifest(self.checkpoint, self.out)
        if self.request.compile:
            compilation.write_cache(self.out / CACHE)
        logger.info("done: %s", record)


def begin(request: Request) -> Run:
    """Opens the checkpoint of a request and makes the output folder whole.

    Raises:
        ValueError: the checkpoint cannot be read, or its denoiser cannot be left out.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    folder = request.resume or request.out
    checkpoint = open_checkpoint(folder, request.recipe)
    if request.restart_denoiser:
        if folder.resolve() == request.out.resolve():
            raise ValueError(
                f"Expected --restart-denoiser with a --resume folder that is not {request.out}, "
                "where the denoiser would be lost. Name another --out."
            )
        checkpoint = checkpoint.without_denoiser(folder)
    cuda = torch.cuda.is_available()
    accelerator = Accelerator(
        cpu=not cuda,
        mixed_precision="bf16" if cuda else "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    peers = join(accelerator)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True  # the usual choice is slow for small 3-D convolutions
    if peers.main:
        request.out.mkdir(parents=True, exist_ok=True)
        copy_checkpoint(checkpoint, folder, request.out)
    peers.wait()
    return Run(request, accelerator, peers, checkpoint)
