"""Evaluates a text-to-video or text-to-image pipeline that scripts/train.py has exported.

    python scripts/evaluate_models.py sheets     --model FOLDER --data data --to docs/tiny-video
    python scripts/evaluate_models.py distance   --model FOLDER --data data --output distance.jsonl
    python scripts/evaluate_models.py neighbours --model FOLDER --data data --to docs/tiny-video
    python scripts/evaluate_models.py maps       --model FOLDER --to docs/tiny-video
    python scripts/evaluate_models.py compare    --model FOLDER --to docs/tiny-video
    python scripts/evaluate_models.py bounds     --model FOLDER --to docs/tiny-video

sheets: contact sheets of fixed held-out prompts and of captions of held-out scenes. distance:
Frechet distance of samples to held-out real clips, beside that of real to real. neighbours: nearest
training frames of samples, beside those of held-out real clips. maps: attention maps as pictures,
and what kind every head is of. compare: error of PISA's and PSA's forms against dense attention at
equal measured time, by kind of head. bounds: how often the Hopper kernel's bound of the scores is
too far above them. For pictures pass --size 1xHEIGHTxWIDTH; `--data shapes` needs
no files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a bare checkout

from dit_sparse.bench import environment
from dit_sparse.evaluation.features import load_extractor
from dit_sparse.evaluation.prompts import fixed_prompts
from scripts.evaluation import bounds, compare, distance, figures, neighbours
from scripts.evaluation.clips import HELD_OUT, open_splits
from scripts.evaluation.maps import map_heads
from scripts.evaluation.model import Model, model_of
from scripts.evaluation.probe import Capture, capture, layers_of
from scripts.evaluation.sheets import held_out_prompts, write_sheets
from scripts.training.source import Source


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True)
    summaries = {
        "sheets": "contact sheets",
        "distance": "Frechet distance to held-out real clips",
        "neighbours": "nearest training frames",
        "maps": "attention maps",
        "compare": "errors of piecewise methods at equal time",
        "bounds": "scores against their bound",
    }
    add = {name: _command(commands.add_parser(name, help=text)) for name, text in summaries.items()}
    for name in ("sheets", "distance", "neighbours"):
        add[name]("--data", required=True, help="folder of built training data, or shapes")
        add[name]("--kind", choices=("clips", "images"), help="set of the folder")
    for name in ("sheets", "neighbours", "maps", "compare", "bounds"):
        add[name]("--to", type=Path, required=True, help="folder to write into")
    add["sheets"]("--count", type=int, default=16, help="prompts of each held-out split")
    for name in ("distance", "neighbours"):
        add[name]("--samples", type=int, default={"distance": 512}.get(name, 128), help="clips")
        add[name]("--per-clip", type=int, default=8, help="frames of each, evenly spread")
    add["distance"]("--output", type=Path, required=True, help="JSON lines to write")
    add["neighbours"]("--training-clips", type=int, default=2048)
    add["neighbours"]("--shown", type=int, default=24, help="pairs in the picture")
    for name in ("maps", "compare", "bounds"):
        add[name]("--prompt", help="what to sample; a fixed prompt by default")
        add[name]("--layers", help="numbers of layers, such as 0,3,7; all by default")
        add[name]("--at", default="0.1,0.5,0.9", help="shares of the schedule at which to look")
    times = "shares of dense attention's time at which to compare"
    add["compare"]("--times", default="0.2,0.3,0.4,0.5,0.7", help=times)
    add["compare"]("--rounds", type=int, default=20, help="timed calls of each method")
    return top


def _command(command: argparse.ArgumentParser) -> Any:
    add = command.add_argument
    add("--model", type=Path, required=True, help="pipeline folder")
    add("--size", default="49x128x128", help="FRAMESxHEIGHTxWIDTH; 1 frame for pictures")
    add("--steps", type=int, default=30, help="of the sampler")
    add("--guidance", type=float, default=4.0)
    add("--batch", type=int, default=8, help="prompts at a time")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return add


def sheets(arguments: argparse.Namespace, model: Model) -> None:
    splits = _splits(arguments, model)
    prompts = held_out_prompts(model, splits, arguments.count, arguments.seed)
    for path in write_sheets(model, prompts, arguments.to):
        print(path)


def measure_distance(arguments: argparse.Namespace, model: Model) -> None:
    extract, splits = load_extractor(model.device), _splits(arguments, model)
    protocol = distance.Protocol(arguments.samples, arguments.per_clip, arguments.seed)
    rows = (
        row
        for split in HELD_OUT
        for row in distance.measure_split(model, split, splits[split], extract, protocol)
    )
    _write_lines(arguments.output, rows, model)


def show_neighbours(arguments: argparse.Namespace, model: Model) -> None:
    counts = (arguments.samples, arguments.training_clips, arguments.per_clip)
    extract = load_extractor(model.device)
    record, pairs = neighbours.measure(
        model, _splits(arguments, model), extract, *counts, arguments.seed
    )
    arguments.to.mkdir(parents=True, exist_ok=True)
    neighbours.draw_pairs(pairs[: arguments.shown], arguments.to / "neighbours.webp")
    _write_lines(arguments.to / "neighbours.jsonl", [record], model)


def _captured(arguments: argparse.Namespace, model: Model) -> tuple[str, tuple[Capture, ...]]:
    """The prompt, and the calls that were asked for."""
    layers = list(range(layers_of(model)))
    if arguments.layers is not None:
        layers = [int(number) for number in arguments.layers.split(",")]
    steps = sorted({round(share * (model.steps - 1)) for share in _numbers(arguments.at)})
    prompt = arguments.prompt or fixed_prompts(model.size[0])[-1]
    return prompt, capture(model, prompt, layers, steps)


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def draw_maps(arguments: argparse.Namespace, model: Model) -> None:
    prompt, captures = _captured(arguments, model)
    maps = list(map_heads(captures))
    title = f"{model.name}: {prompt}; {captures[0].layout} tokens, {model.steps} steps"
    figures.draw_grid(maps, arguments.to / "maps.webp", title, zoom=False)
    figures.draw_grid(maps, arguments.to / "zooms.webp", title, zoom=True)
    figures.draw_examples(maps, arguments.to / "kinds.webp")
    (arguments.to / "heads.md").write_text(figures.table(maps) + "\n", encoding="utf-8")
    lines = ({**m.record(), "prompt": prompt, **model.record()} for m in maps)
    _write_lines(arguments.to / "heads.jsonl", lines, model)
    print(f"{title}: {figures.counts(maps)}")


def compare_methods(arguments: argparse.Namespace, model: Model) -> None:
    prompt, captures = _captured(arguments, model)
    variants = compare.variants_for(captures[0])
    dense, times = compare.measure_times(captures[0], variants, arguments.rounds)
    points = list(compare.points_of(captures, times, dense))
    rows = compare.compare(points, _numbers(arguments.times))
    title = f"{model.name}: {prompt}; {captures[0].layout} tokens, dense {dense:.3f} ms"
    figures.draw_curves(points, arguments.to / "piecewise.webp", title)
    text = f"{title}\n\n{compare.table(rows)}\n"
    (arguments.to / "piecewise.md").write_text(text, encoding="utf-8")
    common = {"prompt": prompt, "dense_ms": dense, **model.record()}
    lines = [{"record": "comparison", **asdict(row), **common} for row in rows]
    lines += [{"record": "point", **asdict(point), **common} for point in points]
    _write_lines(arguments.to / "piecewise.jsonl", lines, model)


def measure_bounds(arguments: argparse.Namespace, model: Model) -> None:
    prompt, captures = _captured(arguments, model)
    rows = list(bounds.measure(captures))
    common = {"prompt": prompt, **model.record()}
    _write_lines(arguments.to / "bounds.jsonl", ({**row, **common} for row in rows), model)
    print(bounds.table(rows))


COMMANDS = {
    "sheets": sheets,
    "distance": measure_distance,
    "neighbours": show_neighbours,
    "maps": draw_maps,
    "compare": compare_methods,
    "bounds": measure_bounds,
}


def _splits(arguments: argparse.Namespace, model: Model) -> Mapping[str, Source]:
    kind = arguments.kind or ("clips" if model.size[0] > 1 else "images")
    return open_splits(arguments.data, kind, model.device)


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]], model: Model) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = environment(model.device)
    with path.open("w", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps({**row, "environment": header}) + "\n")
            lines.flush()
            print(json.dumps(row))


def main() -> None:
    top = parser()
    arguments = top.parse_args()
    try:
        COMMANDS[arguments.command](arguments, model_of(arguments))
    except (ValueError, RuntimeError, OSError) as error:
        top.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
