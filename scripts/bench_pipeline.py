"""Times a denoising step of full-size transformers with random weights, dense and sparse.

    python scripts/bench_pipeline.py --models wan-1.3b-480p flux-2048 --modes eager compiled

One forward without guidance, bf16, variants in turn. Static plans are in the cache, as in every
step but the first; `plan_ms` is what the first one adds. PISA (with means for a tail, and with its
own tail of first order) and PSA plan in every call. Random weights must not flatter what looks at q
and k, so that all read a fixed number of blocks; PARO runs random orders and masks of the density.
`ideal` is the speedup of a sparse kernel with the rate of dense cuDNN attention and free planning
at the measured density, and `of_ideal` how much of it was reached.

Models whose step takes seconds are built with a few of their layers. A step of all of them is then
estimated: in every round the times of two depths give a line, and the estimate lies on it at the
published depth. Such rows say `estimated`, and which layers were timed; `--units 0` times all.

Rows that are in the output are not measured again. A process of its own does the timing: a variant
that hangs or breaks the device is recorded as failed, and the rest goes on in a new one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a bare checkout

from dit_sparse.bench import environment
from scripts.step_bench import DENSE, Bench, Choose, rows
from scripts.step_models import MODELS, Model
from scripts.step_rows import Case, Rows
from scripts.step_variants import names, paro_method, variants
from scripts.supervision import Progress, supervise

_FIRST_SIX = 6
_UNITS = 2  # the deeper of two depths, where a line is drawn through them


@torch.no_grad()
def measure(arguments: argparse.Namespace, device: torch.device) -> None:
    """Measures what is missing in the output, models in the order given."""
    deadline = time.monotonic() + 60 * arguments.minutes
    progress, header = Progress(arguments.progress), environment(device)
    found = Rows(arguments.output)
    for name in arguments.models:
        bench: Bench | None = None
        for mode in sorted(arguments.modes, reverse=True):  # eager first, on the same weights
            case = Case(name, mode == "compiled")
            missing = found.missing(case, [*DENSE, *names(arguments.densities)])
            if not missing or time.monotonic() > deadline:
                continue
            progress.begin(case)
            units = default_units(MODELS[name]) if arguments.units is None else arguments.units
            bench = bench or Bench.build(MODELS[name], units, device)
            for row in measured(bench, case, missing, found, arguments, progress):
                found.append(case, {**row, "environment": header})
                print({k: v for k, v in row.items() if k not in ("tokens", "layers")}, flush=True)
        del bench
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measured(
    bench: Bench,
    case: Case,
    missing: Sequence[str],
    found: Rows,
    arguments: argparse.Namespace,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """The missing rows of a model in one mode. Dense variants are always timed beside others."""
    if case.compiled:
        bench.compile()
    wanted = [v for v in DENSE if v not in found.failed(case)]
    wanted += [v for v in missing if v not in DENSE]
    with TemporaryDirectory() as folder:
        choose = chooser(bench, arguments.densities, Path(folder))
        attention = bench.attention_ms()
        runs = bench.time(wanted, choose, arguments.rounds, arguments.case_seconds, progress)
    for row in rows(bench, runs, attention):
        if row["variant"] in missing:
            yield row


def chooser(bench: Bench, densities: Sequence[float], folder: Path) -> Choose:
    """Methods by name; calibrations are made when they are asked for first."""
    known: dict[tuple[str, int], Any] = {}
    fixed = dict(variants(densities))

    def choose(variant: str, units: int) -> Any:
        if variant in DENSE:
            return None if variant == "stock" else variant
        if variant in fixed:
            return fixed[variant]
        if (variant, units) not in known:
            model, density = bench.model, float(variant.split()[1])
            known[variant, units] = paro_method(
                bench.transformer,
                model.grid,
                model.layers(units),
                model.heads,
                density,
                folder / str(units),
                bench.device,
            )
        return known[variant, units]

    return choose


def default_units(model: Model) -> int:
    return model.units if model.whole else _UNITS * (2 if len(model.stacks) == 1 else 1)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = top.add_argument
    first = list(MODELS)[:_FIRST_SIX]
    add("--models", nargs="+", choices=MODELS, default=first, help="the first six by default")
    add("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    add("--rounds", type=int, default=3, help="timed, beside one that compiles")
    add("--densities", nargs="+", type=float, default=[0.2])
    add("--units", type=int, help="deeper of two depths to time; 0 times whole models")
    add("--output", type=Path, default=Path("benchmarks/steps.jsonl"))
    add("--again", action="store_true", help="measure rows again that are in the output")
    add("--minutes", type=float, default=60.0, help="begin no further model after so many")
    add("--case-seconds", type=float, default=40.0, help="begin no further round after so many")
    add("--row-seconds", type=float, default=150.0, help="a variant without progress has failed")
    add("--progress", type=Path, help=argparse.SUPPRESS)  # of the process that measures
    return top


def main() -> None:
    top = parser()
    arguments = top.parse_args()
    if not torch.cuda.is_available():
        top.error("Expected a CUDA GPU, found none. This benchmark has no meaning on a CPU.")
    if arguments.progress is not None:
        measure(arguments, torch.device("cuda"))
        return
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    cases = [
        Case(name, mode == "compiled") for name in arguments.models for mode in arguments.modes
    ]
    found = Rows(arguments.output)
    if arguments.again:
        found.drop(cases)
    words = [word for word in sys.argv[1:] if word != "--again"]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "progress.json"
        command = [sys.executable, __file__, *words, "--progress", str(path)]
        ended = supervise(command, path, arguments.row_seconds, 60 * arguments.minutes + 600)
        for case, variant, why in ended:
            header = environment("cuda")
            found.append(case, {"variant": variant, "failed": why, "environment": header})
            print(json.dumps({"variant": variant, "failed": why}), flush=True)


if __name__ == "__main__":
    main()
