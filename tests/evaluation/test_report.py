"""Which methods a report shows, and whether their names have room."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from dit_sparse.evaluation import figures, html, tables
from dit_sparse.evaluation.features import EXTRACTOR
from dit_sparse.evaluation.report import _chosen
from dit_sparse.evaluation.store import Store
from dit_sparse.evaluation.summary import Summary, summarise
from tests.evaluation.test_summary import line

LONG = " reuse_steps=3 share_branches=true block=128 least=1 dense_first=0.2 dense_layers=0+1+-1"


@pytest.fixture
def many(tmp_path: Path) -> Summary:
    """Thirty methods: ten are the front, the faster the worse, and the others are far behind it."""
    store = Store(tmp_path)
    store.append(line("stock", 2.0))
    for i in range(30):
        psnr = {"psnr": 35.0 - i if i < 10 else 15.0, "identical": False}
        record = {"layers": [{"density": 0.2}] * 4}
        label = f"pisa density={i / 100}{LONG}"
        changed = {"metrics": psnr, "record": record}
        store.append(line(label, 1.5 - i / 20 if i < 10 else 1.9, **changed))
    return summarise(store, 30.0)


def number(label: str) -> int:
    return round(100 * float(label.split()[1].removeprefix("density=")))


def test_the_recommended_one_is_shown_and_others_along_the_front(many: Summary) -> None:
    def shown(most: int) -> list[int]:
        return [number(row.label) for row in _chosen(many, most)]

    assert [number(row.label) for row in many.front] == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert shown(0) == []
    assert shown(1) == [5]
    assert shown(4) == [5, 9, 4, 0]
    assert {*shown(12)} == {*range(12)}, "the front, then what is not on it"


@pytest.mark.filterwarnings("error::UserWarning")
def test_plots_of_many_methods_with_long_names(many: Summary) -> None:
    svg = figures.pareto(many, "psnr", "PSNR", higher=True)
    assert svg is not None
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    names = [text for text in texts if LONG in text and re.match(r"\d+: ", text)]
    assert [number(text.partition(": ")[2]) for text in names] == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert {str(i) for i in range(1, 11)} <= {*texts}, "numbers stand where names would overlap"
    wide = [figures.seconds(many), figures.layer_densities(many)]
    for plot in filter(None, [svg, *wide]):
        room = re.search(r'width="([\d.]+)pt"', plot)
        assert room is not None
        assert float(room[1]) > 3.5 * len(f"pisa density=0.01{LONG}"), "a letter has 3.5 points"
    assert all(wide)


def test_values_are_written_into_small_tables_of_colours(many: Summary) -> None:
    rows = tuple(replace(row, layers=row.layers * 2) for row in many.rows)
    for summary, count in ((many, 30 * 4), (replace(many, rows=rows), 0)):
        svg = figures.layer_densities(summary)
        assert svg is not None
        assert svg.count(">.20</text>") == count


def test_the_front_is_bold(many: Summary) -> None:
    page, text = html.page(many, {}, {}, {}), tables.markdown(many)
    label = many.front[0].label
    assert f'<tr class="front"><td>{label}</td>' in page
    assert f'<tr class="front best"><td>{many.best.label}</td>' in page  # type: ignore[union-attr]
    assert f"| **{label}** |" in text
    assert f"**pisa density=0.15{LONG}**" not in text


def test_notes_are_of_the_columns_that_are_there(many: Summary) -> None:
    def further(**quality: float) -> tables.Table:
        rows = tuple(replace(row, quality={**row.quality, **quality}) for row in many.rows)
        return tables.tables(replace(many, rows=rows))[1]

    assert further().rows == ()
    picture = further(**{f"FD_{EXTRACTOR}": 12.0})
    assert picture.columns == ("variant", "FD")
    assert "none is an FID or KID." in picture.note
    assert "clips' features" not in picture.note
    assert "flickers" not in picture.note
    clip = further(motion=1.1, **{f"video_KD_{EXTRACTOR}": 0.1})
    assert "no FVD. Motion above 1 flickers more than dense" in clip.note
    assert "unbiased" in clip.note
