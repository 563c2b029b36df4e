"""Runs what a specification asks for and is not in the folder yet."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dit_sparse.bench import environment
from dit_sparse.commands.call import call_arguments
from dit_sparse.commands.models import Model
from dit_sparse.commands.report import describe
from dit_sparse.commands.words import dtype_of
from dit_sparse.evaluation.features import EXTRACTOR
from dit_sparse.evaluation.generate import Generation, generate, install
from dit_sparse.evaluation.metrics import Clip, Metrics
from dit_sparse.evaluation.probe import probe
from dit_sparse.evaluation.prompts import fixed_prompts
from dit_sparse.evaluation.spec import Spec
from dit_sparse.evaluation.store import Line, Store, Task, check_labels
from dit_sparse.evaluation.variants import STOCK, Variant
from dit_sparse.pipelines.compile import compile_blocks

logger = logging.getLogger("dit_sparse")


@dataclass(frozen=True)
class Share:
    """Which part of the work a process does.

    Args:
        process: its number.
        processes: how many there are.
    """

    process: int = 0
    processes: int = 1


@dataclass(eq=False)
class Runner:
    """Runs variants on one model, task by task, so that heat and clocks treat them alike.

    Args:
        spec: what is asked for.
        model: opened.
        store: where results go.
        metrics: to compare clips with.
        share: the part of this process.
        retry: run variants again that failed in an earlier call.
        quiet: no progress bar.
        minutes: after which no further run is begun, counted from here.
        warm: variants that this process has run.
        late: whether runs were left out because the minutes were over.
    """

    spec: Spec
    model: Model
    store: Store
    metrics: Metrics
    share: Share = field(default_factory=Share)
    retry: bool = False
    quiet: bool = False
    minutes: float | None = None
    warm: set[str] = field(default_factory=set)
    late: bool = False

    def __post_init__(self) -> None:
        spec, model = self.spec, self.model
        chosen = spec.prompts or fixed_prompts(2 if model.makes_video else 1)
        self.prompts = chosen[: spec.count]
        # Everything that can be refused is refused before anything runs.
        given = call_arguments(spec)
        self._calls = {p: model.arguments(p, spec.negative_prompt, given) for p in self.prompts}
        self.tasks = [Task(prompt, seed) for seed in spec.seeds for prompt in self.prompts]
        wanted = [{"variant": v.label, "method": _method(v)} for v in spec.variants]
        check_labels([*self.store.lines(), *wanted])
        allowed = math.inf if self.minutes is None else 60 * self.minutes
        self._deadline = time.monotonic() + allowed

    @property
    def settings(self) -> Line:
        """What all runs of a folder have in common."""
        call = self._calls[self.prompts[0]]
        plain = {k: v for k, v in call.items() if isinstance(v, (int, float, str))}
        plain.pop("prompt", None)
        return {
            "model": self.spec.model,
            "pipeline": type(self.model.pipeline).__name__,
            "arguments": dict(sorted(plain.items())),
            "dtype": str(self.spec.dtype).removeprefix("torch."),
            "compiled": self.spec.compile,
            "offload": self.spec.offload,
            "environment": environment(self.spec.device),
        }

    def prepare(self) -> None:
        """Compiles, if asked for, and silences the pipeline's own progress bar."""
        self.model.pipeline.set_progress_bar_config(disable=True)
        if self.spec.compile:
            for transformer in self.model.transformers:
                compile_blocks(transformer)

    def make_clips(self) -> None:
        """The clips of this process's tasks that are missing, compared with the dense ones.

        A variant that failed is not run for further tasks.

        Raises:
            ValueError: the stock pipeline fails, or results cannot be written.
            RuntimeError: the same, or the GPU does not answer after a failure.
        """
        lines = self.store.lines()
        known, failed = done(lines), set() if self.retry else {*failures(lines)}
        mine = self.tasks[self.share.process :: self.share.processes]
        work = [
            (task, [v for v in self.spec.variants if (v.label, task) not in known]) for task in mine
        ]
        total = sum(len(variants) for _, variants in work)
        with tqdm(total=total, desc="clips", disable=self.quiet or not total) as bar:
            for task, variants in work:
                for variant in variants:
                    if self._time_is_up():
                        return
                    bar.set_postfix_str(variant.label)
                    if variant.label not in failed and not self._make_clip(variant, task):
                        failed.add(variant.label)
                    bar.update()

    def measure_again(self) -> None:
        """Computes metrics that clips of earlier calls lack and that can be computed now."""
        names = {*self.metrics.measures}
        measured: dict[tuple[str, Task], set[str]] = {}
        for line in self.store.lines():
            if line["kind"] in ("clip", "metrics") and line["status"] == "ok":
                key = (line["variant"], Task(line["prompt"], line["seed"]))
                measured.setdefault(key, set()).update(line["measured"])
        late = [key for key, known in measured.items() if names - known]
        for label, task in sorted(late, key=lambda key: key[0] != STOCK):  # its features first
            frames = self.store.read_array(self.store.clip_path(label, task))
            if frames is None:
                continue  # clips may be deleted once they are measured
            line = {"kind": "metrics", "variant": label, "prompt": task.prompt, "seed": task.seed}
            numbers = self._measure(label, task, frames)
            self.store.append(line | {"status": "ok"} | numbers)
        self.store.append({"kind": "gaps", "gaps": {**self.metrics.gaps, **self.metrics.unsuited}})

    def repeat_for_time(self) -> None:
        """Further runs of the first task until every variant has enough warm times."""
        lines, task = self.store.lines(), self.tasks[0]
        failed = failures(lines)
        count = {
            v.label: sum(timed_warm(line) for line in lines if line.get("variant") == v.label)
            for v in self.spec.variants
            if v.label not in failed
        }
        missing = {k: max(0, self.spec.rounds - n) for k, n in count.items()}
        with tqdm(
            total=sum(missing.values()),
            desc="times",
            disable=self.quiet or not any(missing.values()),
        ) as bar:
            for turn in range(max(missing.values(), default=0)):
                for variant in self.spec.variants:
                    if missing.get(variant.label, 0) > turn and not self._time_is_up():
                        bar.set_postfix_str(variant.label)
                        if not self._repeat(variant, task):
                            missing[variant.label] = 0
                        bar.update()

    def probe_calls(self) -> None:
        """Looks at attention calls of the first task, for the variants that were not looked at."""
        known = {line["variant"] for line in self.store.lines() if line["kind"] == "time"}
        missing = [v for v in self.spec.variants if v.label not in known]
        if not self.spec.probe_at or all(v.is_baseline for v in missing):
            return
        task = self.tasks[0]
        steps = self._steps(task)
        if steps is None:
            return
        try:
            lines, maps = probe(
                self.model,
                missing,
                self._calls[task.prompt],
                task.seed,
                self.spec.probe_at,
                steps,
            )
        except Exception as error:  # clips and times are there, and are worth a report
            logger.warning("Attention calls could not be looked at: %s", error)
            why = " ".join(str(error).split()) or repr(error)
            self.store.append({"kind": "time", "variant": "all", "failed": why})
            return
        for label, pictures in maps.items():
            self.store.write_array(self.store.map_path(label), pictures)
        for line in lines:
            self.store.append({**line, "prompt": task.prompt, "seed": task.seed})

    def _time_is_up(self) -> bool:
        if time.monotonic() < self._deadline:
            return False
        if not self.late:
            logger.warning("The minutes are over. Run the same command again to go on.")
        self.late = True
        return True

    def _steps(self, task: Task) -> int | None:
        found = [
            line["steps"]
            for line in self.store.lines()
            if line["kind"] == "clip" and line["status"] == "ok" and line["prompt"] == task.prompt
        ]
        return found[0] if found else None

    def _make_clip(self, variant: Variant, task: Task) -> bool:
        line = self._begin("clip", variant, task)
        try:
            made = self._generate(variant, task)
            line |= _costs(made)
            line |= self._keep(variant, task, made.frames)
        except _CannotGoOnError:
            raise
        except Exception as error:  # one method's fault, whatever it is, must not end the others
            if variant.label == STOCK:
                raise
            self._note_failure(line, variant, error)
            return False
        self.store.append(line)
        return True

    def _repeat(self, variant: Variant, task: Task) -> bool:
        line = self._begin("repeat", variant, task)
        try:
            if variant.label not in self.warm:  # in a process that only goes on with times
                self._generate(variant, task)
            line |= _costs(self._generate(variant, task)) | {"warm": True}
        except Exception as error:  # as above: the others' times are still wanted
            self._note_failure(line, variant, error)
            return False
        self.store.append(line)
        return True

    def _generate(self, variant: Variant, task: Task) -> Generation:
        install(self.model, variant)
        try:
            made = generate(self.model, variant, self._calls[task.prompt], task.seed)
        finally:
            install(self.model, Variant(STOCK))
        self.warm.add(variant.label)
        return made

    def _begin(self, kind: str, variant: Variant, task: Task) -> Line:
        return {
            "kind": kind,
            "variant": variant.label,
            "method": _method(variant),
            "prompt": task.prompt,
            "seed": task.seed,
            "status": "ok",
            "warm": variant.label in self.warm,
            "process": self.share.process,
            "command": self._command(variant),
        }

    def _command(self, variant: Variant) -> list[str]:
        """What runs the same for a prompt; empty if `dit-sparse sample` cannot."""
        if not variant.words:
            return []
        spec = self.spec
        words = ["dit-sparse", "sample", "--model", spec.model, *variant.words]
        for name in ("frames", "height", "width", "steps", "guidance", "negative_prompt"):
            value = getattr(spec, name)
            words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
        if spec.dtype != dtype_of(None, spec.device):
            words += ["--dtype", str(spec.dtype).removeprefix("torch.")]
        words += ["--offload", spec.offload] if spec.offload != "none" else []
        return [*words, "--compile"] if spec.compile else words

    def _keep(self, variant: Variant, task: Task, frames: np.ndarray) -> dict[str, Any]:
        """Writes a clip and compares it with the dense one."""
        path = self.store.clip_path(variant.label, task)
        try:
            self.store.write_array(path, frames)
        except ValueError as error:
            raise _CannotGoOnError(str(error)) from error
        name = path.relative_to(self.store.folder).as_posix()
        return {"clip": name, **self._measure(variant.label, task, frames)}

    def _measure(self, label: str, task: Task, frames: np.ndarray) -> dict[str, Any]:
        """The numbers of a clip; its features are written beside it."""
        clip = Clip.of(frames, task.prompt, self.spec.device)
        found = self.metrics.features_of(clip)
        for name, array in found.items():
            try:
                self.store.write_array(self.store.feature_path(label, task, name), array)
            except ValueError as error:
                raise _CannotGoOnError(str(error)) from error
        numbers = self.metrics.alone(clip)
        if label != STOCK:
            kept = torch.from_numpy(found[EXTRACTOR]) if EXTRACTOR in found else None
            numbers |= self.metrics.compare(replace(clip, features=kept), self._dense(task))
        return {"measured": sorted(self.metrics.measures), "metrics": numbers}

    def _dense(self, task: Task) -> Clip:
        path = self.store.clip_path(STOCK, task)
        frames = self.store.read_array(path)
        if frames is None:
            raise _CannotGoOnError(
                f"Expected the dense clip {str(path)!r}, got none that can be read. Choose another "
                "--output to make all clips again."
            )
        found = self.store.read_array(self.store.feature_path(STOCK, task, EXTRACTOR))
        return Clip.of(frames, task.prompt, self.spec.device, found)

    def _note_failure(self, line: Line, variant: Variant, error: Exception) -> None:
        reason = " ".join(str(error).split()) or repr(error)
        logger.warning("%s failed: %s", variant.label, reason)
        line |= {"status": "failed", "error": f"{type(error).__name__}: {reason}"}
        self.store.append(line)
        if self.spec.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.spec.device)
            except RuntimeError as broken:
                raise _CannotGoOnError(
                    f"Expected the GPU to go on after {variant.label} failed, got {broken}. Run "
                    "the same command again: it goes on without that method."
                ) from error
            torch.cuda.empty_cache()


class _CannotGoOnError(ValueError):
    """Not the fault of a method, or one that it does not leave the others a chance after."""


def done(lines: Sequence[Mapping[str, Any]]) -> set[tuple[str, Task]]:
    """Variants and tasks that have a clip."""
    return {
        (line["variant"], Task(line["prompt"], line["seed"]))
        for line in lines
        if line["kind"] == "clip" and line["status"] == "ok"
    }


def failures(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Variants with a task that failed and was not made good since, with the latest reason."""
    made = done(lines)
    return {
        line["variant"]: line["error"]
        for line in lines
        if line["kind"] == "clip"
        and line["status"] == "failed"
        and (line["variant"], Task(line["prompt"], line["seed"])) not in made
    }


def timed_warm(line: Mapping[str, Any]) -> bool:
    """Whether a line has times of the first process that no compilation or tuning is part of."""
    made = line["kind"] in ("clip", "repeat") and line["status"] == "ok"
    return made and line["warm"] and line["process"] == 0


def _method(variant: Variant) -> str | None:
    return None if variant.method is None else describe(variant.method)


def _costs(made: Generation) -> dict[str, Any]:
    frames, height, width, _ = made.frames.shape
    return {
        "size": [frames, height, width],
        "steps": made.steps,
        "seconds": made.seconds.to_dict(),
        "peak_bytes": made.peak_bytes,
        "density": made.density,
        "record": None if made.record is None else made.record.to_dict(),
    }
