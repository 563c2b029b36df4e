"""The tables of a report, as cells; and the Markdown page made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

from dit_sparse.evaluation.features import EXTRACTOR
from dit_sparse.evaluation.summary import Row, Summary

Cell = Callable[[Row], str]


@dataclass(frozen=True)
class Table:
    """A heading, column names and rows of text."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(summary: Summary) -> tuple[Table, ...]:
    """Every table of a report; columns that would be empty are left out."""
    return (
        _table(
            "Speed and quality",
            "Speedups are over the fastest dense variant of this folder, from medians of "
            "interleaved runs. PSNR and SSIM are against the stock pipeline from the same noise, "
            "means over clips, with the worst clip in brackets; identical clips are left out of "
            "the mean. Bold is the front: what no other method beats in both speed and PSNR.",
            summary,
            _MAIN,
        ),
        _table(
            "Further quality",
            "Against the same clips.",
            summary,
            _QUALITY,
            _QUALITY_NOTES,
        ),
        _table(
            "Time",
            "Medians in seconds of a whole call of the pipeline; half the interquartile range of "
            "denoising beside it.",
            summary,
            _TIME,
        ),
        _table(
            "Speed model",
            "One attention call in the middle of the model and of the schedule was timed apart. "
            "Ideal: a kernel with the rate of dense attention and free planning at the measured "
            "density. Predicted: from the kernel's and the plan's own times. What is measured "
            "below the prediction is overhead outside both.",
            summary,
            _MODEL,
        ),
    )


def markdown(summary: Summary) -> str:
    """The report without pictures."""
    parts = ["# Quality against speed", "", f"**{summary.recommendation}**", ""]
    if summary.command is not None:
        parts += ["```bash", summary.command, "```", ""]
    parts += [conditions(summary), ""]
    front = {row.label for row in summary.front}
    for table in tables(summary):
        if table.rows:
            parts += [f"## {table.title}", "", table.note, "", *_markdown_rows(table, front), ""]
    for title, notes in (("Failed", summary.failed), ("Not measured", summary.gaps)):
        if notes:
            parts += [f"## {title}", "", *(f"- {name}: {why}" for name, why in notes.items()), ""]
    parts += ["## Prompts", "", *(f"- {prompt}" for prompt in summary.prompts), ""]
    return "\n".join(parts)


def conditions(summary: Summary) -> str:
    """What was run, and where, in a paragraph."""
    settings = dict(summary.settings)
    environment = settings.get("environment", {})
    arguments = settings.get("arguments", {})
    packages = ("torch", "triton", "diffusers", "dit-sparse", "cudnn")
    versions = [f"{n} {environment[n]}" for n in packages if environment.get(n)]
    parts = len(settings.get("parts", ()))
    given = ", ".join(f"{name} {value}" for name, value in arguments.items())
    return (
        f"{settings.get('model')} ({settings.get('pipeline')}), {given}; "
        f"{len(summary.prompts)} prompts, seeds {', '.join(map(str, summary.seeds))}; "
        f"{environment.get('device')}, {settings.get('dtype')}, "
        f"{'compiled blocks' if settings.get('compiled') else 'eager'}, {', '.join(versions)}. "
        f"Fastest dense variant: {summary.baseline}."
        + (f" Merged from {parts} folders; speedups are within each." if parts else "")
    )


def _table(
    title: str,
    note: str,
    summary: Summary,
    columns: Sequence[tuple[str, Cell]],
    notes: Sequence[tuple[Set[str], str]] = (),
) -> Table:
    """Args:
    notes: sentences behind the note, each for columns one of which must be there.
    """
    rows = [row for row in summary.rows if row.clips or row.failed]
    cells = [[of(row) for _, of in columns] for row in rows]
    kept = [i for i in range(len(columns)) if i == 0 or any(line[i] for line in cells)]
    if len(kept) < 2:
        return Table(title, note, (), ())
    names = tuple(columns[i][0] for i in kept)
    return Table(
        title,
        " ".join([note, *(text for of, text in notes if of & {*names})]),
        names,
        tuple(tuple(line[i] for i in kept) for line in cells),
    )


def _markdown_rows(table: Table, front: Set[str]) -> list[str]:
    rows = [(f"**{row[0]}**", *row[1:]) if row[0] in front else row for row in table.rows]
    lines = [table.columns, tuple("---" for _ in table.columns), *rows]
    return ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]


def _quality(name: str, form: str, *, worst: bool = False) -> Cell:
    def cell(row: Row) -> str:
        value = row.quality.get(name)
        if value is None:
            same = name == "psnr" and row.psnr == math.inf
            return "identical" if same else ""
        low = f" ({row.worst[name]:{form}})" if worst and name in row.worst else ""
        return f"{value:{form}}{low}"

    return cell


def _model(name: str, form: str) -> Cell:
    def cell(row: Row) -> str:
        value = None if row.model_of_speed is None else getattr(row.model_of_speed, name)
        return "" if value is None else f"{value:{form}}"

    return cell


def _seconds(name: str) -> Cell:
    return lambda row: f"{row.seconds[name]:.3f}" if row.seconds else ""


def _speedup(row: Row) -> str:
    return "" if row.speedup is None else f"{row.speedup:.2f}x"


def _of_ideal(row: Row) -> str:
    if row.model_of_speed is None or row.speedup is None or row.is_baseline:
        return ""
    return f"{row.speedup / row.model_of_speed.ideal:.2f}"


def _runs(times: int) -> str:
    return "1 run" if times == 1 else f"{times} runs"


def _label(row: Row) -> str:
    return row.label


_MAIN: tuple[tuple[str, Cell], ...] = (
    ("variant", _label),
    ("density", lambda row: f"{row.density:.3f}" if row.clips else ""),
    ("speedup", _speedup),
    (
        "end to end",
        lambda row: "" if row.speedup_total is None else f"{row.speedup_total:.2f}x",
    ),
    ("PSNR dB", _quality("psnr", ".2f", worst=True)),
    ("SSIM", _quality("ssim", ".4f", worst=True)),
    ("LPIPS", _quality("lpips", ".4f")),
    ("clips", lambda row: str(row.clips)),
    ("failed", lambda row: "yes" if row.failed else ""),
)
_QUALITY: tuple[tuple[str, Cell], ...] = (
    ("variant", _label),
    ("motion", _quality("motion", ".3f")),
    ("temporal PSNR dB", _quality("temporal_psnr", ".2f")),
    ("cosine", _quality(f"cosine_{EXTRACTOR}", ".4f")),
    ("FD", _quality(f"FD_{EXTRACTOR}", ".3f")),
    ("KD", _quality(f"KD_{EXTRACTOR}", ".4f")),
    ("video KD", _quality(f"video_KD_{EXTRACTOR}", ".4f")),
    ("FID", _quality("FID", ".3f")),
    ("KID", _quality("KID", ".4f")),
    ("CLIP score", _quality("clip_score", ".2f")),
)
_QUALITY_NOTES: tuple[tuple[Set[str], str], ...] = (
    (
        {"FD", "KD", "cosine"},
        f"FD, KD and cosine are distances of {EXTRACTOR} features of frames; none is an FID or "
        "KID.",
    ),
    ({"video KD"}, "Video KD is one of clips' features, and no FVD."),
    ({"FID", "KID"}, "FID and KID are of the same frames, against those of the dense clips."),
    ({"motion"}, "Motion above 1 flickers more than dense, below 1 less."),
    (
        {"KD", "video KD", "KID"},
        "The kernel distances are unbiased for independent clips; of clips from the same noise "
        "they may come out below 0.",
    ),
)
_TIME: tuple[tuple[str, Cell], ...] = (
    ("variant", _label),
    ("step", _seconds("step")),
    ("text", _seconds("encode")),
    ("denoising", _seconds("denoise")),
    ("±", lambda row: f"{row.spread:.1%}" if row.times > 1 else ""),
    ("decoding", _seconds("decode")),
    ("total", _seconds("total")),
    ("of", lambda row: _runs(row.times) if row.times else "cold run" * bool(row.seconds)),
    (
        "peak memory",
        lambda row: "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f} GiB",
    ),
)
_MODEL: tuple[tuple[str, Cell], ...] = (
    ("variant", _label),
    ("attention share", _model("attention_share", ".0%")),
    ("density", lambda row: f"{row.density:.3f}" if row.clips else ""),
    ("attention TFLOP", _model("teraflop", ".2f")),
    ("dense call ms", _model("dense_ms", ".3f")),
    ("sparse call ms", _model("kernel_ms", ".3f")),
    ("kernel rate of dense", _model("kernel_efficiency", ".2f")),
    ("plan ms", _model("plan_ms", ".3f")),
    ("planning share", _model("plan_share", ".1%")),
    ("ideal", _model("ideal", ".2f")),
    ("predicted", _model("predicted", ".2f")),
    ("measured", lambda row: "" if row.speedup is None else f"{row.speedup:.2f}"),
    ("of ideal", _of_ideal),
)
