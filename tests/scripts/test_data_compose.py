"""The composer: shapes, determinism, truthful captions, held-out splits."""

import itertools
import math
import re

import numpy as np
import pytest
import torch

from scripts.data import backgrounds, motions, palette
from scripts.data.captions import ACTION_WORDS, write_captions
from scripts.data.compose import Composer
from scripts.data.motions import ACTIONS
from scripts.data.names import Design
from scripts.data.preview import contact_sheet
from scripts.data.scenes import MOST, cast, draw_scenes, half_sides
from scripts.data.sprites import Sprites

SIDE = 32


def design(name, group="objects", held=False, mirror=True) -> Design:
    return Design(name, name, f"a {name}", False, group, "", (), mirror, held)


def sprites(frames=4, designs=None) -> Sprites:
    """Full squares: red, green and blue in turn; the left half is white, so that a turn shows."""
    designs = designs or tuple(
        design(name, held=name == "pear") for name in ("cow", "hat", "cup", "key", "pear")
    )
    pixels = torch.zeros(len(designs), frames, 4, SIDE, SIDE, dtype=torch.uint8)
    for i in range(len(designs)):
        pixels[i, :, i % 3] = 255
        pixels[i, :, :3, :, : SIDE // 2] = 255
    pixels[:, :, 3] = 255
    return Sprites(pixels, designs, torch.arange(len(designs)), ("",) * len(designs))


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scenes_of(split="train", batch=400, frames=25, height=64, width=64, shown=None):
    shown = shown or sprites()
    rng = np.random.default_rng(0)
    colours = np.zeros((len(shown), 3), np.float32)
    parts = (cast(shown, split), split, shown, colours)
    return draw_scenes(rng, *parts, batch, frames, height, width), rng, shown


@pytest.mark.parametrize(
    ("frames", "height", "width"), [(1, 64, 64), (5, 48, 96), (25, 32, 32), (8, 96, 40)]
)
def test_any_size_and_length(frames, height, width):
    video, captions = Composer(sprites(), "train", "cpu").batch(6, frames, height, width, seeded())
    assert video.shape == (6, 3, frames, height, width)
    assert video.dtype == torch.float32
    assert video.is_contiguous()
    assert video.min() >= -1
    assert video.max() <= 1
    assert len(captions) == 6
    assert all(captions)


def test_the_generator_decides_everything():
    composer = Composer(sprites(), "train", "cpu")
    one, two, other = (composer.batch(4, 9, 32, 32, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one[0], two[0])
    assert one[1] == two[1]
    assert not torch.equal(one[0], other[0])
    assert composer.captions(4, 9, seeded(1)) == one[1]


def test_chunks_do_not_change_the_picture(monkeypatch):
    composer = Composer(sprites(), "train", "cpu")
    whole = composer.batch(4, 5, 32, 32, seeded())[0]
    monkeypatch.setattr("scripts.data.compose.PIXELS_AT_ONCE", 3 * 32 * 32)
    assert torch.equal(whole, composer.batch(4, 5, 32, 32, seeded())[0])


@pytest.mark.parametrize("size", [(0, 1, 64, 64), (1, 0, 64, 64), (1, 1, 8, 64)])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValueError, match="at least 1 clip"):
        Composer(sprites(), "train", "cpu").batch(*size, seeded())


def test_unknown_and_empty_splits_are_refused():
    with pytest.raises(ValueError, match="split"):
        Composer(sprites(), "test", "cpu")
    with pytest.raises(ValueError, match="none"):
        Composer(sprites(designs=(design("cow"),)), "held_out", "cpu")


def test_held_out_designs_are_never_trained_on():
    seen = {
        name: {shown.names[row] for row in scenes.sprite.ravel()}
        for name in ("train", "compositions", "held_out")
        for scenes, _, shown in [scenes_of(name)]
    }
    assert seen["held_out"] == {"pear"}
    assert seen["train"] == seen["compositions"] == {"cow", "hat", "cup", "key"}


def test_held_out_compositions_are_never_trained_on():
    def compositions(split):
        scenes, _, shown = scenes_of(split, batch=4000)
        return {
            (shown.names[scenes.sprite[i, 0]], scenes.action(i, 0), int(scenes.background.kind[i]))
            for i in range(4000)
        }

    assert not compositions("train") & compositions("compositions")
    assert len(compositions("train")) > 200


def test_the_evaluation_set_is_fixed_and_never_the_training_split():
    composer = Composer(sprites(), "compositions", "cpu")
    video, captions = composer.held_out(20, 2, 32, 32)
    again, same = composer.held_out(20, 2, 32, 32)
    assert torch.equal(video, again)
    assert captions == same
    assert len(captions) == len(video) == 20
    with pytest.raises(ValueError, match="train"):
        Composer(sprites(), "train", "cpu").held_out(1, 1, 32, 32)


def test_people_are_capped_and_equal_phrases_share_a_turn():
    people = [design(f"person {i}", group="people-body") for i in range(30)]
    things = [design(f"thing {i}") for i in range(8)]
    clocks = [design(f"clock {i}") for i in range(6)]
    clocks = [Design(c.code, c.name, "a clock", *list(vars(c).values())[3:]) for c in clocks]
    drawn = cast(sprites(designs=(*people, *things, *clocks)), "train")
    by_name = dict(zip((d.name for d in (*people, *things, *clocks)), drawn.weights, strict=True))
    assert sum(by_name[d.name] for d in people) == pytest.approx(0.2)
    assert sum(by_name[d.name] for d in clocks) == pytest.approx(by_name["thing 0"])


@pytest.mark.parametrize("action", ACTIONS)
def test_paths_do_what_their_name_says(action):
    count, frames = 50, 25
    rng = np.random.default_rng(0)
    scale = np.full(count, 0.5, np.float32)
    room, centre = np.full((count, 2), 0.5), np.zeros((count, 2))
    kinds = np.full(count, ACTIONS.index(action))
    track = motions.draw(rng, kinds, scale, room, centre).tracks(frames)
    across = track.x[:, -1] - track.x[:, 0]
    along = track.y[:, -1] - track.y[:, 0]
    turned = np.ptp(track.angle, 1)
    grown = track.scale[:, -1] / track.scale[:, 0]
    if action in ("left", "arc left"):
        assert (across < -0.3).all()
    elif action in ("right", "arc right"):
        assert (across > 0.3).all()
    elif action == "up":
        assert (along < -0.3).all()
    elif action == "down":
        assert (along > 0.3).all()
    elif action == "bounce":
        assert (np.ptp(track.y, 1) > 0.3).all()
    elif action == "circle":
        assert (np.minimum(np.ptp(track.x, 1), np.ptp(track.y, 1)) > 0.2).all()
    elif action == "spin":
        assert (turned >= 2 * math.pi - 1e-3).all()
    elif action == "swing":
        assert ((turned > 0.5) & (turned < 1.1)).all()
    elif action == "shake":
        assert ((np.ptp(track.x, 1) > 0.02) & (np.ptp(track.x, 1) < 0.1)).all()
    elif action == "zoom in":
        assert (grown > 2).all()
    elif action == "zoom out":
        assert (grown < 0.5).all()
    else:
        assert not (np.ptp(track.x, 1) + np.ptp(track.y, 1) + turned).any()
        assert (grown == 1).all()


@pytest.mark.parametrize("frames", [1, 2, 8])
def test_short_clips_claim_no_periodic_motion(frames):
    scenes, _, _ = scenes_of(frames=frames)
    allowed = {"still"} if frames == 1 else set(ACTIONS) - set(motions.PERIODIC)
    actions = {scenes.action(i, k) for i in range(400) for k in range(scenes.count[i])}
    assert actions <= allowed


def test_captions_name_what_is_there():
    scenes, rng, shown = scenes_of()
    captions = write_captions(rng, scenes, shown, 25, half_sides(64, 64))
    for i, caption in enumerate(captions):
        names = [shown.names[row] for row in scenes.sprite[i, : scenes.count[i]]]
        assert all(name in caption for name in names)
        absent = {"cow", "hat", "cup", "key"} - set(names)
        assert not any(name in caption for name in absent)
        if re.search(r"\b(mov|slid|drift|jump|fl[iy]).*\b(right|left)\b", caption):
            action = scenes.action(i, 0)
            assert {"left": "right", "right": "left"}.get(action.split()[-1]) != caption.split()[-1]
        colours = {palette.NAMES[scenes.background.first[i]]}
        colours |= {palette.NAMES[scenes.background.second[i]], "light", "dark"}
        named = set(re.findall("|".join(sorted(palette.NAMES, key=len, reverse=True)), caption))
        assert named <= colours


def test_captions_of_stills_hold_no_motion():
    scenes, rng, shown = scenes_of(frames=1)
    captions = write_captions(rng, scenes, shown, 1, half_sides(64, 64))
    moving = {way[2] for ways in ACTION_WORDS.values() for way in ways}
    assert not [c for c in captions if moving & set(c.replace(",", "").split())]


def test_sides_in_captions_are_the_sides_in_the_picture():
    scenes, rng, shown = scenes_of(frames=1, batch=2000, width=128)
    half = half_sides(64, 128)
    captions = write_captions(rng, scenes, shown, 1, half)
    checked = 0
    for i, caption in enumerate(captions):
        x = scenes.moves.home[i * MOST, 0]
        if scenes.count[i] == 1 and " on the left" in caption:
            checked += 1
            assert x < -0.3 * half[0]
        if match := re.search(r"a (\w+) to the left of a (\w+)", caption):
            checked += 1
            left, right = (
                next(k for k in range(2) if shown.names[scenes.sprite[i, k]] == name)
                for name in match.groups()
            )
            homes = scenes.moves.home[i * MOST : i * MOST + 2, 0]
            assert homes[left] < homes[right]
    assert checked > 20


def test_a_sprite_is_pasted_where_the_scene_says():
    """Renders one unmirrored sprite at rest and finds its colours around its centre."""
    composer = Composer(sprites(frames=1), "train", "cpu")
    scenes, _, shown = scenes_of(frames=1, batch=200)
    video = composer._render(scenes, 1, 64, 64)[:, :, 0]
    checked = 0
    for i in np.flatnonzero((scenes.count == 1) & (scenes.framing != 1)):
        track = scenes.moves.tracks(1)
        x, y, scale = (getattr(track, n)[i * MOST, 0] for n in ("x", "y", "scale"))
        side = -1 if not scenes.mirror[i, 0] else 1
        column, row = 32 + 64 * (x + side * scale / 4), 32 + 64 * y
        far = 32 + 64 * (x - side * scale / 4)
        if all(2 < place < 62 for place in (column, far, row)):
            checked += 1
            hue = shown.design_of[scenes.sprite[i, 0]].item() % 3
            assert video[i, :, int(row), int(column)].min() > 0.9  # the white half
            coloured = video[i, :, int(row), int(far)]
            assert coloured.argmax() == hue
            assert coloured.sum() < -0.9
    assert checked > 50


def test_designs_that_must_not_be_mirrored_are_not():
    shown = sprites(designs=tuple(design(n, mirror=False) for n in ("left fist", "map", "tie")))
    assert not scenes_of(shown=shown)[0].mirror.any()
    assert scenes_of()[0].mirror.any()


@pytest.mark.parametrize("kind", range(len(backgrounds.KINDS)), ids=backgrounds.KINDS)
def test_backgrounds_show_their_two_colours(kind):
    rng = np.random.default_rng(0)
    count = 12
    scene = backgrounds.draw(rng, np.full(count, kind), np.zeros((count, 3), np.float32))
    pictures = backgrounds.render(scene, 48, 64, torch.device("cpu"))
    assert pictures.shape == (count, 3, 48, 64)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    second = (
        np.ones_like(scene.tint[:, 1]) if backgrounds.KINDS[kind] == "night" else scene.tint[:, 1]
    )
    for i, ends in itertools.product(range(count), range(2)):
        if ends and backgrounds.KINDS[kind] in ("plain", "night", "clouds"):
            continue
        wanted = torch.from_numpy((scene.tint[:, 0], second)[ends][i])[:, None, None]
        limit = 0.35 if backgrounds.KINDS[kind] == "clouds" else 0.12
        assert (pictures[i] - wanted).abs().amax(0).min() < limit


def test_stored_frames_wrap_around():
    scenes, _, _ = scenes_of()
    shown = scenes.stored_frames(49, 24)
    assert shown.min() == 0
    assert shown.max() == 23
    steps = np.diff(shown, axis=-1) % 24
    assert steps.max() <= 2


def test_a_contact_sheet_holds_every_sample():
    video, captions = Composer(sprites(), "train", "cpu").batch(5, 9, 32, 48, seeded())
    sheet = contact_sheet(video, captions, 4)
    assert sheet.size == (4 * 48, 5 * (32 + 40))
    stills = contact_sheet(video[:, :, :1], captions, 4)
    assert stills.size == (4 * 48, 2 * (32 + 40))
