"""Tables of whole denoising steps, for `report.py`."""

from __future__ import annotations

from typing import Any

from scripts.report_lines import environment_of

#: Dense variants of a step.
_DENSE_STEPS = ("stock", "dense")


def steps_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of whole denoising steps, dense and with every method."""
    lines = [
        f"{environment_of(rows)}, random weights of the full size, one forward without guidance, "
        f"variants in turn, {_rounds(rows)}. The baseline is the faster of diffusers' default and "
        "this package's dense attention; *ideal* is a sparse kernel with the rate of dense cuDNN "
        "and free planning at the measured density. Times with a ~ are estimates for all layers, "
        "on the line through the times of two depths.",
        "",
        "| model, tokens | mode | diffusers | dense | attention | method | density | sparse "
        "| speedup | ideal | of ideal |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, mode), group in _groups(rows).items():
        dense = [_milliseconds(group.get(name, {})) for name in _DENSE_STEPS]
        lines += [
            f"| {model}, {row['tokens']:,} | {mode} | "
            f"{' | '.join(dense)} | {row['attention_share']:.0%} | {row['variant'].split()[0]} | "
            f"{row['measured_density']:.3f} | {_milliseconds(row)} | {row['speedup']:.2f}x | "
            f"{row['ideal']:.2f}x | {row['speedup'] / row['ideal']:.2f} |"
            for name, row in group.items()
            if name not in _DENSE_STEPS and "ms" in row
        ]
    return "\n".join([*lines, *_failures(rows)])


def steps_summary(rows: list[dict[str, Any]]) -> str:
    """`steps_table` in a line for each model and mode: speedups alone."""
    methods = list(
        dict.fromkeys(row["variant"] for row in rows if row["variant"] not in _DENSE_STEPS)
    )
    lines = [
        f"{environment_of(rows)}, random weights of the full size, one forward without guidance, "
        f"variants in turn, {_rounds(rows)}. Speedups over the faster of diffusers' default and "
        "this package's dense attention, planning included; in brackets what a sparse kernel with "
        "the rate of dense cuDNN and free planning would reach. Times with a ~ are estimates for "
        "all layers, on the line through the times of two depths.",
        "",
        f"| model, tokens | mode | dense | attention | {' | '.join(methods)} |",
        f"|---|---|---|---|{'---|' * len(methods)}",
    ]
    for (model, mode), group in _groups(rows).items():
        times = [group[name] for name in _DENSE_STEPS if "ms" in group.get(name, {})]
        if not times:
            continue  # why not is said below the table
        dense = min(times, key=_time)
        cells = [_against_ideal(group.get(name, {})) for name in methods]
        lines.append(
            f"| {model}, {dense['tokens']:,} | {mode} | "
            f"{_milliseconds(dense)} | {dense['attention_share']:.0%} | {' | '.join(cells)} |"
        )
    return "\n".join([*lines, *_failures(rows)])


def _groups(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """Rows by variant, of each model and mode."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["model"], _mode(row)), {})[row["variant"]] = row
    return found


def _mode(row: dict[str, Any]) -> str:
    return "compiled" if row["compiled"] else "eager"


def _time(row: dict[str, Any]) -> float:
    return float(row["ms"])


def _against_ideal(row: dict[str, Any]) -> str:
    if "ms" not in row:
        return _milliseconds(row)
    return f"{row['speedup']:.2f}x ({row['ideal']:.2f})"


def _rounds(rows: list[dict[str, Any]]) -> str:
    counts = {row["rounds"] for row in rows if "rounds" in row} or {1}
    least, most = min(counts), max(counts)
    if most == 1:
        return "one round each behind one that compiles"
    return f"medians of {least} to {most} rounds" if least < most else f"medians of {most} rounds"


def _milliseconds(row: dict[str, Any]) -> str:
    if "ms" not in row:
        return "failed" if "failed" in row else ""
    return f"{'~' * bool(row.get('estimated'))}{row['ms']:.0f} ms"


def _failures(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each row that says why there is no time."""
    found = [row for row in rows if "failed" in row]
    lines = [
        f"* {row['model']}, {_mode(row)}, {row['variant']} failed: {row['failed'][:200]}"
        for row in found
    ]
    return ["", *lines] if lines else []
