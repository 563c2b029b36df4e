"""What orders per head are worth: masks of one density in several orders, against dense clips."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import dit_sparse
from dit_sparse.calibration import Calibration
from dit_sparse.calibration_solver import Settings
from dit_sparse.commands.sample import psnr
from scripts.evaluation.model import Model


@dataclass(frozen=True)
class Study:
    """What to compare.

    Args:
        calibrated_on: prompts of the calibrations.
        tested_on: prompts of the clips that are compared, with the same noise for all.
        densities: of the picture's block pairs.
        settings: of the calibrations, but for the criterion.
        folder: where calibrations are kept, a folder each.
    """

    calibrated_on: Sequence[str]
    tested_on: Sequence[str]
    densities: Sequence[float]
    settings: Settings
    folder: Path


def calibrate(model: Model, study: Study, criterion: str, density: float) -> Calibration:
    """Calibrates a model and keeps the result; reads what is there already."""
    folder = study.folder / f"{criterion}-{density:g}"
    if (folder / "calibration.json").exists():
        return Calibration.from_pretrained(folder)
    found = dit_sparse.calibrate(
        model.pipe,
        list(study.calibrated_on),
        density=density,
        settings=replace(study.settings, criterion=criterion),  # type: ignore[arg-type]
        call=model.call,
        model=model.name,
        folder=folder,
        progress=False,
    )
    found.save_pretrained(folder)
    return found


def compare(model: Model, study: Study, criteria: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One row for each criterion and density: PSNR of its clips against the dense ones."""
    dense = list(model.sample(study.tested_on))
    for density in study.densities:
        for criterion in criteria:
            begin = time.perf_counter()
            found = calibrate(model, study, criterion, density)
            seconds = time.perf_counter() - begin
            options = {"path": str(study.folder / f"{criterion}-{density:g}")}
            dit_sparse.apply(model.pipe, "paro", options=options)
            try:
                clips = list(model.sample(study.tested_on))
                measured = dit_sparse.summary(model.pipe).density
            finally:
                dit_sparse.remove(model.pipe)
            decibels = [psnr(a, b) for a, b in zip(clips, dense, strict=True)]
            seen = sorted(found.masks)
            yield {
                "criterion": criterion,
                "asked": density,
                "density": measured,
                "kept_mass": float(found.kept_mass[seen].mean()),
                "dense_heads": len(found.dense_heads),
                "psnr": float(np.mean(decibels)),
                "psnr_each": [round(value, 3) for value in decibels],
                "calibration_seconds": round(seconds, 2),
            }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: PSNR of every criterion, and its gain over raster order at the same density."""
    raster = {row["asked"]: row["psnr"] for row in rows if row["criterion"] == "raster"}
    lines = [
        "| orders | density asked | measured | kept mass | dense heads | PSNR | over raster |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gain = row["psnr"] - raster[row["asked"]] if row["asked"] in raster else float("nan")
        lines.append(
            f"| {row['criterion']} | {row['asked']:g} | {row['density']:.3f} "
            f"| {row['kept_mass']:.3f} | {row['dense_heads']} | {row['psnr']:.2f} dB "
            f"| {gain:+.2f} dB |"
        )
    return "\n".join(lines)
