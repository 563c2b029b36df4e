"""One HTML page with everything inside it: no script, no other file, no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape

from dit_sparse.evaluation.sheets import AMPLIFIED
from dit_sparse.evaluation.summary import Summary
from dit_sparse.evaluation.tables import Table, conditions, tables

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff;
  max-width: 1180px; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; border-bottom: 1px solid #d8dee4; }
.advice { font-size: 1.1rem; background: #eef6ff; border-left: 4px solid #0969da;
  padding: .7rem 1rem; margin: 1rem 0; }
.note { color: #57606a; font-size: .88rem; max-width: 80ch; }
pre { background: #f6f8fa; padding: .7rem 1rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .45rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #eaeef2; }
th { white-space: normal; vertical-align: bottom; max-width: 6.5em; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 19em;
  max-width: 30em; overflow-wrap: anywhere; }
tr.front td:first-child { font-weight: 600; }
tr.best td { background: #dafbe1; }
.plots { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 1rem; margin-top: 1rem; }
figure { margin: 0 0 1rem; }
figcaption { font-size: .85rem; color: #57606a; margin-bottom: .2rem; }
img { max-width: 100%; height: auto; }
.clips { display: flex; flex-wrap: wrap; gap: 0 1.5rem; }
.clips img { image-rendering: auto; border: 1px solid #d8dee4; }
"""


def page(
    summary: Summary,
    plots: Mapping[str, str | bytes],
    sheets: Mapping[str, bytes],
    moving: Mapping[str, bytes],
) -> str:
    """The page.

    Args:
        summary: what was measured.
        plots: SVG, or WebP as bytes, by name.
        sheets, moving: WebP by variant.
    """
    found = tables(summary)
    count = sum(row.clips > 0 for row in summary.rows if not row.is_baseline)
    shown = _shown(len(sheets), count)
    body = [
        "<h1>Quality against speed</h1>",
        f'<p class="note">{escape(conditions(summary))}</p>',
        f'<p class="advice">{escape(summary.recommendation)}</p>',
        "" if summary.command is None else f"<pre>{escape(summary.command)}</pre>",
        _table(found[0], summary),
        _plots({k: v for k, v in plots.items() if k in _FIRST}),
        _pictures(
            "Clips in motion",
            f"Dense, with the method, and their difference times {AMPLIFIED}. {shown}",
            moving,
        ),
        *(_table(table, summary) for table in found[1:]),
        "<h2>Where it is dense and where it errs</h2>" if set(plots) - _FIRST else "",
        _plots({k: v for k, v in plots.items() if k not in _FIRST}),
        _pictures(
            "Frames",
            f"Rows: dense, with the method, and their difference times {AMPLIFIED}. {shown}",
            sheets,
        ),
        _notes("Failed", summary.failed),
        _notes("Not measured", summary.gaps),
        "<h2>Prompts</h2>",
        f"<ol>{''.join(f'<li>{escape(prompt)}</li>' for prompt in summary.prompts)}</ol>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Quality against speed: {escape(str(summary.settings.get('model', '')))}</title>"
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(filter(None, body)) + "\n"
        "</body></html>\n"
    )


_FIRST = {"PSNR", "SSIM", "LPIPS", "Features", "Seconds"}


def _shown(some: int, count: int) -> str:
    if some >= count:
        return ""
    return (
        f"Of {some} of the {count} methods: the recommended one and others along the front. "
        "The option --shown says how many."
    )


def _table(table: Table, summary: Summary) -> str:
    if not table.rows:
        return ""
    best = None if summary.best is None else summary.best.label
    front = {row.label for row in summary.front}
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    rows = [
        f'<tr class="{"front" * (cells[0] in front)}{" best" * (cells[0] == best)}">'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for cells in table.rows
    ]
    return (
        f'<h2>{escape(table.title)}</h2><p class="note">{escape(table.note)}</p>'
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _plots(plots: Mapping[str, str | bytes]) -> str:
    sources = {
        name: _data("webp", plot) if isinstance(plot, bytes) else _data("svg+xml", plot.encode())
        for name, plot in plots.items()
    }
    figures = [
        f'<figure><img alt="{escape(name)}" src="{source}"></figure>'
        for name, source in sources.items()
    ]
    return f'<div class="plots">{"".join(figures)}</div>' if figures else ""


def _pictures(title: str, note: str, pictures: Mapping[str, bytes]) -> str:
    if not pictures:
        return ""
    figures = [
        f"<figure><figcaption>{escape(label)}</figcaption>"
        f'<img alt="{escape(label)}" src="{_data("webp", data)}"></figure>'
        for label, data in pictures.items()
    ]
    return (
        f'<h2>{escape(title)}</h2><p class="note">{escape(note)}</p>'
        f'<div class="clips">{"".join(figures)}</div>'
    )


def _notes(title: str, notes: Mapping[str, str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li><b>{escape(n)}</b>: {escape(why)}</li>" for n, why in notes.items())
    return f"<h2>{escape(title)}</h2><ul>{items}</ul>"


def _data(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
