"""The report of an evaluation: one HTML page that needs no other file, and one of Markdown."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np

from dit_sparse.evaluation import figures, html, sheets, tables
from dit_sparse.evaluation.spec import SHOWN
from dit_sparse.evaluation.store import Store, Task
from dit_sparse.evaluation.summary import Row, Summary
from dit_sparse.evaluation.variants import STOCK

logger = logging.getLogger("dit_sparse")

_MAPS = 4  # variants whose block maps are on it, at most


def write_report(store: Store, summary: Summary, shown: int = SHOWN) -> tuple[Path, ...]:
    """Writes `report.html`, `report.md` and `summary.jsonl`, with whatever can be shown.

    Args:
        store: of the evaluation.
        summary: of the same.
        shown: variants whose pictures are on the page, which weighs little beside them.

    Raises:
        ValueError: a file cannot be written.
    """
    chosen = _chosen(summary, shown)
    pictures = {row.label: _picture(store, row, "sheet") for row in chosen}
    moving = {row.label: _picture(store, row, "moving") for row in chosen}
    plots = _plots(store, summary, chosen)
    page = html.page(
        summary,
        plots,
        {label: data for label, data in pictures.items() if data},
        {label: data for label, data in moving.items() if data},
    )
    return (
        store.write_text("report.html", page),
        store.write_text("report.md", tables.markdown(summary)),
        store.write_text("summary.jsonl", _lines(summary)),
    )


def _chosen(summary: Summary, most: int) -> list[Row]:
    """The recommended variant, others evenly spread over the front, then the rest in turn."""
    best = [] if summary.best is None else [summary.best]
    front = [row for row in summary.front if row not in best]
    spread = [front[i] for i in sheets.spread(len(front), max(0, most - len(best)))]
    rest = [row for row in summary.rows if not row.is_baseline]
    order = {row.label: row for row in (*best, *spread, *front, *rest)}
    return [row for row in order.values() if row.clips][:most]


def _plots(store: Store, summary: Summary, chosen: list[Row]) -> dict[str, str | bytes]:
    """SVG or WebP by name; empty, with a warning, where matplotlib is missing."""
    found: dict[str, str | bytes] = {}
    try:
        for name, draw in figures.PLOTS:
            svg = draw(summary)
            if svg is not None:
                found[name] = svg
        for row in chosen[:1]:
            for key, title in (("error", "relative error"), ("kept", "mass read exactly")):
                svg = figures.head_heat(summary, row.label, key, title)
                if svg is not None:
                    found[f"{title}, {row.label}"] = svg
        stored = {row.label: store.read_array(store.map_path(row.label)) for row in chosen[:_MAPS]}
        maps = figures.block_pictures({k: v for k, v in stored.items() if v is not None})
        if maps is not None:
            found["Attention maps"] = maps
    except ImportError as error:
        logger.warning("No plots in the report: %s. Install matplotlib.", error)
    return found


def _picture(store: Store, row: Row, kind: str) -> bytes | None:
    """A picture of the variant's first clip, made anew while the clips are there."""
    path = store.picture_path(row.label, kind)
    pair = _first_pair(store, row.label)
    if pair is None or (kind == "moving" and len(pair[0]) == 1):
        return path.read_bytes() if path.is_file() else None
    data = sheets.sheet(*pair) if kind == "sheet" else sheets.moving(*pair)
    store.write_bytes(path, data)
    return data


def _first_pair(store: Store, label: str) -> tuple[np.ndarray, np.ndarray] | None:
    for line in store.lines():
        if line["kind"] == "clip" and line["status"] == "ok" and line["variant"] == label:
            task = Task(line["prompt"], line["seed"])
            clip, dense = (store.read_array(store.clip_path(n, task)) for n in (label, STOCK))
            if clip is not None and dense is not None:
                return clip, dense
    return None


def _lines(summary: Summary) -> str:
    """One line for each variant, with everything that it depends on."""
    common = {
        "prompts": summary.prompts,
        "seeds": summary.seeds,
        "baseline": summary.baseline,
        "recommendation": summary.recommendation,
        **summary.settings,
    }
    return "".join(
        json.dumps({**row.to_dict(), **common}, allow_nan=False) + "\n" for row in summary.rows
    )
