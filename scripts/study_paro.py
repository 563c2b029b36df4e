"""Measures on a model's folder what PARO's orders and 8 bits are worth, and draws its orders.

    python scripts/study_paro.py orders   --model FOLDER --to docs/paro
    python scripts/study_paro.py rounding --model FOLDER --to docs/paro
    python scripts/study_paro.py pictures --model FOLDER --to docs/paro

orders: masks of the same densities in the orders of each criterion and in raster order, PSNR
against the dense clips with the same noise; no head falls back to dense attention. rounding: cosine
with float64 of attention in 8 and 4 bits on real q, k and v. pictures: maps of heads before and
after reordering, and the order of each head, of the calibration that `orders` has made for the
first criterion and density, or one that is made now. Calibrations are kept and read again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a bare checkout

from dit_sparse.bench import environment
from dit_sparse.calibration_solver import Settings
from dit_sparse.evaluation.prompts import fixed_prompts
from scripts.evaluation import order_figures, order_study, rounding
from scripts.evaluation.model import Model, model_of
from scripts.evaluation.probe import Capture, capture, layers_of

CRITERIA = ("concentration", "paper", "raster")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("command", choices=tuple(COMMANDS))
    add = top.add_argument
    add("--model", type=Path, required=True, help="pipeline folder")
    add("--to", type=Path, required=True, help="folder to write into")
    add("--size", default="49x128x128", help="FRAMESxHEIGHTxWIDTH; 1 frame for pictures")
    add("--steps", type=int, default=30, help="of the sampler")
    add("--guidance", type=float, default=4.0)
    add("--batch", type=int, default=4, help="prompts at a time")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--calibrations", type=Path, help="folder of calibrations; TO/calibrations by default")
    add("--calibrated-on", type=int, default=2, help="fixed prompts, the last ones")
    add("--tested-on", type=int, default=4, help="fixed prompts, the first ones")
    add("--densities", default="0.3,0.2")
    add("--criteria", default=",".join(CRITERIA), help="of orders; raster for comparison")
    add("--block", type=int, default=64, help="tokens of a block: 64 or 128")
    add("--segments", type=int, default=4, help="parts of the steps with masks of their own")
    add("--layers", help="numbers of layers to look at, such as 0,3,7; all by default")
    add("--at", default="0.1,0.5,0.9", help="shares of the schedule at which to look")
    return top


def orders(arguments: argparse.Namespace, model: Model) -> None:
    rows = order_study.compare(model, _study(arguments, model), arguments.criteria.split(","))
    found = _write_lines(arguments.to / "orders.jsonl", rows, model)
    _write(arguments.to / "orders.md", order_study.table(found))


def measure_rounding(arguments: argparse.Namespace, model: Model) -> None:
    captures = _captures(arguments, model)
    rows = _write_lines(arguments.to / "rounding.jsonl", rounding.measure(captures), model)
    _write(arguments.to / "rounding.md", rounding.table(rows))


def draw(arguments: argparse.Namespace, model: Model) -> None:
    criterion = arguments.criteria.split(",")[0]
    study = _study(arguments, model)
    found = order_study.calibrate(model, study, criterion, study.densities[0])
    order_figures.draw_orders(found, arguments.to / "orders.webp")
    captures = _captures(arguments, model)
    shown = order_figures.draw_reordered(captures, found, arguments.to / "reordered.webp")
    print(f"{found}: {shown} heads drawn before and after reordering")


COMMANDS = {"orders": orders, "rounding": measure_rounding, "pictures": draw}


def _study(arguments: argparse.Namespace, model: Model) -> order_study.Study:
    prompts = fixed_prompts(model.size[0])
    return order_study.Study(
        calibrated_on=prompts[-arguments.calibrated_on :],
        tested_on=prompts[: arguments.tested_on],
        densities=[float(density) for density in arguments.densities.split(",")],
        # Heads that fell back to dense attention would be read at another density in each order.
        settings=Settings(
            block=arguments.block, segments=arguments.segments, least_mass=0.0, seed=model.seed
        ),
        folder=arguments.calibrations or arguments.to / "calibrations",
    )


def _captures(arguments: argparse.Namespace, model: Model) -> tuple[Capture, ...]:
    layers = list(range(layers_of(model)))
    if arguments.layers is not None:
        layers = [int(number) for number in arguments.layers.split(",")]
    shares = [float(share) for share in arguments.at.split(",")]
    steps = sorted({round(share * (model.steps - 1)) for share in shares})
    return capture(model, fixed_prompts(model.size[0])[0], layers, steps)


def _write_lines(
    path: Path, rows: Iterable[Mapping[str, Any]], model: Model
) -> list[Mapping[str, Any]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {**model.record(), "environment": environment(model.device)}
    kept = []
    with path.open("w", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps({**row, **header}) + "\n")
            lines.flush()
            kept.append(row)
    return kept


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
    print(text)


def main() -> None:
    top = parser()
    arguments = top.parse_args()
    try:
        COMMANDS[arguments.command](arguments, model_of(arguments))
    except (ValueError, RuntimeError, OSError) as error:
        top.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
