"""`dit-sparse evaluate`: runs variants of attention on a model and reports quality and speed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

import dit_sparse
from dit_sparse.commands.models import open_model
from dit_sparse.commands.words import at_least
from dit_sparse.evaluation.merge import merge as merge_folders
from dit_sparse.evaluation.metrics import Metrics
from dit_sparse.evaluation.report import write_report
from dit_sparse.evaluation.runner import Runner, Share
from dit_sparse.evaluation.spec import SHOWN, Spec
from dit_sparse.evaluation.store import Store
from dit_sparse.evaluation.summary import Summary, summarise

_LAUNCHED = "DIT_SPARSE_LAUNCHED"


@dataclass(frozen=True)
class Report:
    """What an evaluation found, and where it is written.

    Args:
        folder: of the results.
        files: report pages.
        summary: one row for each variant.
    """

    folder: Path
    files: tuple[Path, ...]
    summary: Summary

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "output": str(self.folder),
            "files": [str(path) for path in self.files],
            **self.summary.to_dict(),
        }

    def __str__(self) -> str:
        return f"{self.summary}\n{', '.join(str(path) for path in self.files)}"


def evaluate(
    spec: Spec, *, retry: bool = False, quiet: bool = False, minutes: float | None = None
) -> Report | None:
    """Runs what is missing in the folder and writes the report anew.

    Args:
        spec: what to run.
        retry: run methods again that failed before.
        quiet: no progress bars.
        minutes: begin no further run after so many; the report is of what is there.

    In several processes (`accelerate launch`), prompts are split over them and the first one does
    the rest.

    Returns:
        The report; `None` in all processes but the first.

    Raises:
        ValueError: something in the specification is wrong, or results cannot be written.
    """
    share, device = _place(spec)
    spec = replace(spec, device=device)
    weights = (spec.lpips_weights, spec.clip_model, spec.inception_weights)
    metrics = Metrics.open(spec.metrics, device, *weights)
    model = open_model(spec.model, device=device, dtype=spec.dtype, offload=spec.offload)
    spec = replace(spec, variants=tuple(variant.on(model) for variant in spec.variants))
    store = Store(spec.output, share.process)
    quiet = quiet or share.process > 0
    runner = Runner(spec, model, store, metrics, share, retry, quiet, minutes)
    store.agree(runner.settings)
    runner.prepare()
    runner.make_clips()
    if share.processes > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()
    if share.process > 0:
        return None
    runner.measure_again()
    runner.probe_calls()
    runner.repeat_for_time()
    summary = summarise(store, spec.target_psnr)
    return Report(spec.output, write_report(store, summary, spec.shown), summary)


def merge(
    folders: Sequence[Path], into: Path, target_psnr: float = 30.0, shown: int = SHOWN
) -> Report:
    """One report of folders that were evaluated apart, each with its own methods.

    Args:
        folders, into: see `dit_sparse.evaluation.merge.merge`.
        target_psnr, shown: see `Spec`.

    Raises:
        ValueError: see `dit_sparse.evaluation.merge.merge`; a negative `shown`.
    """
    at_least(shown, 0, "--shown")
    store = merge_folders(folders, into)
    summary = summarise(store, target_psnr)
    return Report(into, write_report(store, summary, shown), summary)


def launch(processes: int, words: Sequence[str]) -> int:
    """Runs this command in several processes on this machine; the exit code of the launch.

    Args:
        processes: one for each GPU that is to be used.
        words: of the command line, from `evaluate` on.

    Raises:
        ValueError: there are not so many GPUs, or this process was itself launched.
    """
    if _LAUNCHED in os.environ:  # else a launcher that starts one process would begin a chain
        raise ValueError(
            f"Expected to be one of {processes} processes, got one by itself. Give --processes to "
            "the first command only."
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if processes < 1 or (gpus and processes > gpus):
        raise ValueError(f"Expected --processes from 1 to {max(gpus, 1)}, got {processes}.")
    root = str(Path(dit_sparse.__file__).parents[1])  # runs from a bare checkout
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", str(processes), "-m", "dit_sparse", *words),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), _LAUNCHED: "1"}
    return subprocess.run(command, env=environment, check=False).returncode


def launched() -> bool:
    """Whether this process is one of several, of ours or of `accelerate launch`."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _place(spec: Spec) -> tuple[Share, torch.device]:
    """The part of this process and the device that it computes on."""
    if not launched():
        return Share(), spec.device
    from accelerate import PartialState

    # Processes wait for the slowest, whose share may take hours longer.
    state = PartialState(cpu=spec.device.type == "cpu", timeout=timedelta(days=7))
    return Share(state.process_index, state.num_processes), state.device
