"""Numbers, kinds and pictures of attention maps, against maps made by hand."""

import math

import pytest
import torch

from dit_sparse.grid import TextSpan, TokenGrid, TokenLayout
from scripts.evaluation import figures
from scripts.evaluation.maps import HeadMap, attention_rows, map_head, pool, zoom_range
from scripts.evaluation.probe import Capture
from scripts.evaluation.structure import KINDS, Regions, kind_of, numbers_of

CLIP = TokenLayout.of(TokenGrid(25, 8, 8))
PICTURE = TokenLayout.of(TokenGrid(1, 30, 40), 7)


def means(rows: torch.Tensor, layout: TokenLayout) -> dict[str, float]:
    """Means of the numbers of a map of the picture's queries `[grid, N]`."""
    found = numbers_of(rows, torch.arange(layout.grid.length), layout)
    return {name: float(value.mean()) for name, value in found.items()}


def within(layout: TokenLayout, *reach: int) -> torch.Tensor:
    """The map whose queries read evenly what is at most `reach` away along each axis."""
    place = layout.grid.coordinates()
    near = ((place[:, None] - place[None]).abs() <= torch.tensor(reach)).all(-1).float()
    rows = torch.zeros(layout.grid.length, layout.length)
    rows[:, layout.grid_start : layout.grid_start + layout.grid.length] = near
    return rows / rows.sum(1, keepdim=True)


def uniform(layout: TokenLayout) -> torch.Tensor:
    return torch.full((layout.grid.length, layout.length), 1 / layout.length)


def test_a_uniform_map():
    found, regions = means(uniform(CLIP), CLIP), Regions(CLIP.grid)
    assert found["entropy"] == pytest.approx(math.log(1600), rel=1e-5)
    assert found["best 10 %"] == pytest.approx(0.1, rel=1e-4)
    assert found["best 20 %"] == pytest.approx(0.2, rel=1e-4)
    assert found["text"] == 0
    for name in regions.extents:
        assert found[name] == pytest.approx(regions.share(name), rel=1e-4)
    assert found["frame"] == pytest.approx(1 / 25, rel=1e-4)
    assert found["place"] == pytest.approx(1 / 64, rel=1e-4)
    assert kind_of(found) == "global"


def test_the_shapes_of_a_clip_are_about_equally_large():
    regions = Regions(TokenGrid(25, 16, 16))
    assert regions.extents["box"] == (9, 5, 5)
    assert regions.extents["slab"] == (1, 16, 16)
    assert regions.extents["line"] == (25, 3, 3)
    shares = [regions.share(name) for name in ("box", "slab", "line")]
    assert max(shares) / min(shares) < 1.2
    assert regions.share("window") == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize(
    ("reach", "kind", "whole"),
    [
        ((2, 1, 1), "local", ("window", "box")),
        ((0, 8, 8), "frame-local", ("slab", "frame")),
        ((25, 0, 0), "multi-diagonal", ("line", "place")),
        ((0, 0, 0), "local", ("window", "box", "slab", "frame", "line", "place")),
        ((25, 8, 8), "global", ()),
    ],
)
def test_hand_made_clips(reach, kind, whole):
    found = means(within(CLIP, *reach), CLIP)
    assert kind_of(found) == kind
    for name in Regions(CLIP.grid).extents:
        assert (found[name] == pytest.approx(1, abs=1e-5)) == (name in whole), name


@pytest.mark.parametrize(
    ("reach", "kind"),
    [((0, 3, 3), "local"), ((0, 0, 40), "row-local"), ((0, 30, 0), "multi-diagonal")],
)
def test_hand_made_pictures(reach, kind):
    found = means(within(PICTURE, *reach), PICTURE)
    assert kind_of(found) == kind
    assert "frame" not in found


def test_mass_on_text():
    rows = uniform(PICTURE)
    assert means(rows, PICTURE)["text"] == pytest.approx(7 / 1207, rel=1e-4)
    rows = torch.zeros_like(rows)
    rows[:, 0] = 0.6
    rows[:, 7:] = 0.4 / 1200
    found = means(rows, PICTURE)
    assert found["text"] == pytest.approx(0.6)
    assert kind_of(found) == "text-sink"


def test_little_text_does_not_change_the_kind():
    """A shape is judged by its share of what is on the picture."""
    rows = 0.7 * within(PICTURE, 0, 3, 3)
    rows[:, 0] = 0.3
    rows = rows * 0.5 + 0.5 * 0.7 * within(PICTURE, 0, 30, 40)
    rows[:, 0] = 0.3
    assert kind_of(means(rows, PICTURE)) == "local"


def capture_of(layout: TokenLayout, heads: int = 1, dim: int = 8) -> Capture:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(heads, layout.length, dim, generator=generator) for _ in range(2))
    return Capture(layer=3, step=5, layout=layout, q=q, k=k)


def test_rows_are_the_softmax_whatever_the_block():
    layout = TokenLayout((TextSpan(5, (3,)), TokenGrid(2, 3, 4)))
    taken = capture_of(layout)
    scores = taken.q[0] @ taken.k[0].T / math.sqrt(8)
    scores[:, 3:5] = -torch.inf
    for block in (4, 100):
        starts, rows = zip(*attention_rows(taken.q[0], taken.k[0], layout, block), strict=True)
        assert starts == tuple(range(0, 29, block))
        assert torch.allclose(torch.cat(rows), scores.softmax(-1), atol=1e-6)


def test_a_head_in_blocks_is_the_head_at_once(monkeypatch):
    layout = TokenLayout.of(TokenGrid(6, 12, 12), 10)
    taken = capture_of(layout)
    whole = map_head(taken, 0)
    monkeypatch.setattr("scripts.evaluation.maps._ROWS", 100)
    parts = map_head(taken, 0)
    rows = (taken.q[0] @ taken.k[0].T / math.sqrt(8)).softmax(-1)
    expected = means(rows[10:], layout)
    for name, value in expected.items():
        assert whole.numbers[name] == pytest.approx(value, rel=1e-4)
        assert parts.numbers[name] == pytest.approx(value, rel=1e-4)
    for found in (whole, parts):
        assert torch.allclose(found.picture.float(), pool(rows, 2), atol=1e-4)
        first, last = zoom_range(layout)
        assert torch.allclose(found.zoom.float(), pool(rows[first:last, first:last], 2), atol=1e-4)


def test_the_zoom_is_the_middle():
    assert zoom_range(TokenLayout.of(TokenGrid(25, 16, 16))) == (10 * 256, 14 * 256)
    assert zoom_range(TokenLayout.of(TokenGrid(1, 64, 64), 512)) == (512 + 28 * 64, 512 + 36 * 64)
    assert zoom_range(TokenLayout.of(TokenGrid(2, 3, 4))) == (0, 24)


def test_pooling_keeps_the_mass_of_a_row():
    rows = torch.rand(6, 8).softmax(-1)
    assert torch.allclose(pool(rows, 2).sum(1), torch.ones(3))
    assert pool(torch.ones(5, 5), 2).shape == (3, 3)


def head_map(kind: str, layer: int, head: int, step: int, box: float = 0.5) -> HeadMap:
    names = ("entropy", "best 10 %", "best 20 %", "text", "box", "slab", "line", "window")
    numbers = {**dict.fromkeys(names, 0.25), "box": box}
    return HeadMap(layer, head, step, numbers, kind, torch.rand(8, 8).half(), torch.rand(4, 4))


def test_figures_and_table(tmp_path):
    pytest.importorskip("matplotlib")
    maps = [
        head_map(KINDS[(layer + head) % 2], layer, head, step, box=head / 2)
        for layer in range(6)
        for head in range(2)
        for step in (0, 9)
    ]
    figures.draw_grid(maps, tmp_path / "new" / "maps.webp", "a title", zoom=False)
    figures.draw_examples(maps, tmp_path / "kinds.webp")
    assert (tmp_path / "new" / "maps.webp").stat().st_size > 1000
    assert (tmp_path / "kinds.webp").stat().st_size > 1000
    assert [(m.kind, m.head) for m in figures.examples(maps)] == [
        ("local", 1),
        ("multi-diagonal", 1),
    ]
    assert figures.counts(maps) == "12 local, 12 multi-diagonal"
    lines = figures.table(maps).splitlines()
    assert len(lines) == 2 + 12
    assert lines[0].startswith("| layer | head | step 0 | step 9 | entropy | best 10 % |")
    assert (
        lines[3] == "| 0 | 1 | multi-diagonal | multi-diagonal | 0.25 | 0.25 | 0.25 | 0.25 | 0.25 |"
    )
