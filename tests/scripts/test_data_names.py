"""Names, phrases and the hold-out rule."""

import json

import pytest

from scripts.data.names import HELD_OUT, catalogue, held_out_names
from scripts.data.phrases import clean, phrase


def row(hexcode, annotation, group="animals-nature", base="", subgroup="animal", tags=""):
    return {
        "hexcode": hexcode,
        "annotation": annotation,
        "group": group,
        "subgroups": subgroup,
        "tags": tags,
        "skintone_base_hexcode": base,
    }


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        ("cow", "a cow"),
        ("OK hand", "an ok hand"),
        ("unicorn", "a unicorn"),
        ("hourglass done", "an hourglass"),
        ("clapping hands", "clapping hands"),
        ("octopus", "an octopus"),
        ("women holding hands", "women holding hands"),
        ("family: man, girl", "a family of a man and a girl"),
        ("family: adult, child", "a family of an adult and a child"),
        ("kiss: woman, man", "kissing woman and man"),
        ("couple with heart: man, man", "a couple of a man and a man with a heart"),
        ("smiling face with heart-eyes", "a smiling face with heart-eyes"),
        ("man: bald", "a bald man"),
        ("woman: red hair", "a woman with red hair"),
        ("man: beard", "a man with a beard"),
        ("woman getting massage", "a woman getting a massage"),
        ("three o’clock", "a clock"),  # noqa: RUF001 - as the table writes it
        ("O button (blood type)", "an o button"),
        ("sun", "the sun"),
        ("fog", "fog"),
        ("kaaba", "the kaaba"),
        ("sun behind small cloud", "a sun behind a small cloud"),
        ("beach with umbrella", "a beach with an umbrella"),
        ("umbrella on ground", "an umbrella on the ground"),
        ("airplane arrival", "an airplane landing"),
        ("backhand index pointing left", "a hand seen from the back pointing left"),
    ],
)
def test_phrases_are_english(annotation, expected):
    assert phrase(clean(annotation))[0] == expected


@pytest.mark.parametrize(
    ("name", "plural"),
    [("eyes", True), ("people hugging", True), ("bus", False), ("compass", False), ("cow", False)],
)
def test_plurals_take_a_plural_verb(name, plural):
    assert phrase(name)[1] is plural


def test_tones_share_one_design_and_flags_are_left_out():
    table = [
        row("1F44B", "waving hand", group="people-body"),
        row("1F44B-1F3FB", "waving hand: light skin tone", group="people-body", base="1F44B"),
        row("1F3C1", "chequered flag", group="flags"),
        row("21A9-FE0F", "right arrow curving left", group="symbols", subgroup="arrow"),
    ]
    names = catalogue(json.dumps(table).encode())
    assert list(names.designs) == ["1F44B"]
    assert names.design_of("1f44b-1f3fb") is names.designs["1F44B"]
    assert names.design_of("1f3c1") is None


def test_directions_are_not_mirrored():
    table = [row("1", "left-facing fist"), row("2", "cow")]
    designs = catalogue(json.dumps(table).encode()).designs
    assert not designs["1"].mirror
    assert designs["2"].mirror


def test_every_group_holds_out_its_share_whatever_the_order():
    named = [(group, f"{group} {i}") for group in "ab" for i in range(100)]
    held = held_out_names(named)
    assert held == held_out_names(reversed(named))
    for group in "ab":
        assert sum(name.startswith(group) for name in held) == round(100 * HELD_OUT)
