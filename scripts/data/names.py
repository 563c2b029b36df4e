"""What the pictures are called: names, noun phrases, groups and the held-out designs.

A design is one picture idea ("cow", "woman farmer"), whatever the drawing style or skin tone.
Names, groups and tags come from OpenMoji's table (CC-BY-SA-4.0); code points tie it to the other
packages.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

HELD_OUT = 0.08  # share of the designs of every group that training never sees
SKIPPED_GROUPS = ("flags", "component", "extras-openmoji", "extras-unicode")
SKIPPED_NAMES = ("middle finger",)  # no picture to show by chance
SIGNS_KEPT = ("geometric",)  # subgroups of "symbols" whose pictures are no writing

_PHRASES = {
    "kiss": "kissing couple",
    "zzz": "sleeping sign zzz",
    "breast-feeding": "breast-feeding woman",
    "rolling on the floor laughing": "face rolling on the floor laughing",
    "star-struck": "star-struck face",
    "high voltage": "lightning bolt",
    "hourglass not done": "hourglass with running sand",
    "hourglass done": "hourglass",
    "wood": "wooden log",
    "hundred points": "red number hundred",
    "fire": "flame",
    "selfie": "hand taking a selfie",
    "nail polish": "hand with nail polish",
    "horse racing": "racing horse with a jockey",
    "love-you gesture": "love-you hand",
    "vulcan salute": "vulcan salute hand",
    "face in clouds": "face in the clouds",
    "seat": "passenger seat",
    "collision": "explosion",
    "dizzy": "dizzy star",
    "dashing away": "puff of dust",
    "tennis": "tennis racket with a ball",
    "bowling": "bowling ball with pins",
    "cricket game": "cricket bat with a ball",
    "field hockey": "field hockey stick with a ball",
    "ice hockey": "ice hockey stick with a puck",
    "lacrosse": "lacrosse stick with a ball",
    "ping pong": "ping pong paddle with a ball",
    "badminton": "badminton racket with a shuttlecock",
    "locked": "closed padlock",
    "unlocked": "open padlock",
    "locked with pen": "closed padlock with a pen",
    "locked with key": "closed padlock with a key",
    "construction": "construction barrier",
    "performing arts": "pair of theatre masks",
    "flower playing cards": "flower playing card",
    "headphone": "pair of headphones",
}
_BARE = (
    "fog|milky way|sun|santa claus|mrs. claus|mx claus|rice|bread|cheese|bacon|spaghetti|popcorn|"
    "butter|salt|garlic|broccoli|honey|sushi|money|sake|seaweed|luggage|thread|yarn|dna|soap|sand"
)
_THE = ("sun", "milky way")
_HEAD_ENDS = (
    "with|without|of|in|on|behind|from|to|and|blowing|over|for|under|at|by|wearing|above|savoring"
)
_WANTS_ARTICLE = re.compile(  # "man getting massage": telegram style
    r"\b(getting|raising|tipping|feeding|rowing|bouncing|taking|wearing|with|in|over|without) "
    r"(massage|haircut|hand|baby|boat|ball|bath|turban|veil|white cane|motorized wheelchair"
    r"|manual wheelchair|tuxedo|headscarf|skullcap|crown|steamy room|suit|medical mask|thermometer"
    r"|head-bandage|halo|tear|monocle|cowboy hat|wry smile|ribbon|heart|hearing aid|flash|handle"
    r"|raised eyebrow|diagonal mouth|peeking eye|popping cork|face)\b(?!-)"
)
_PLAIN = str.maketrans({"\u2019": "'", "\u201c": "", "\u201d": "", "!": "", "é": "e", "ñ": "n"})
_NO_MIRROR = re.compile(
    r"left|right|o'clock|thirty|clock|watch|facing|index|arrow|letter|keycap|button|sign|symbol"
    r"|calendar|\bok\b|zzz|hundred|number|dollar|euro|yen|pound|percent|date|sos|abc|page|news"
)


@dataclass(frozen=True)
class Design:
    """One picture idea.

    Attributes:
        code: Code points without tones and variation selectors, as "1F404".
        name: Lower-case name, "cow"; equal in all sets.
        phrase: Noun phrase with its article, "a cow", "clapping hands".
        plural: Whether the phrase takes a plural verb.
        group, subgroup: OpenMoji's.
        tags: Related words.
        mirror: Whether the mirrored picture is still what the phrase says.
        held_out: Never shown in training, in any set.
    """

    code: str
    name: str
    phrase: str
    plural: bool
    group: str
    subgroup: str
    tags: tuple[str, ...]
    mirror: bool
    held_out: bool


@dataclass(frozen=True)
class Catalogue:
    """All designs by code; `design_of` also knows the codes of their skin-tone variants."""

    designs: Mapping[str, Design]
    bases: Mapping[str, str]

    def design_of(self, code: str) -> Design | None:
        """The design that the code points `code` ("1f44b-1f3fb") draw, or None."""
        return self.designs.get(self.bases.get(plain_code(code), ""))

    def by_name(self) -> dict[str, Design]:
        """Designs by their name without anything but letters and digits."""
        return {squeeze(design.name): design for design in self.designs.values()}


def catalogue(table: bytes) -> Catalogue:
    """Reads OpenMoji's `data/openmoji.json`; flags, written signs and extras are left out."""
    rows = [
        row
        for row in json.loads(table)
        if row["group"] not in SKIPPED_GROUPS
        and row["annotation"] not in SKIPPED_NAMES
        and (row["group"] != "symbols" or row["subgroups"] in SIGNS_KEPT)
    ]
    bases = {
        plain_code(row["hexcode"]): plain_code(row["skintone_base_hexcode"] or row["hexcode"])
        for row in rows
    }
    own = [row for row in rows if bases[plain_code(row["hexcode"])] == plain_code(row["hexcode"])]
    held = held_out_names((row["group"], clean(row["annotation"])) for row in own)
    designs = (_design(row, held) for row in own)
    return Catalogue({design.code: design for design in designs}, bases)


def held_out_names(named: Iterable[tuple[str, str]]) -> frozenset[str]:
    """The held-out names of (group, name) pairs.

    Of every group, the `HELD_OUT` share of the names whose SHA-256 comes first. The rule sees names
    alone, so every picture set holds out the same ones.
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for group, name in named:
        groups[group].add(name)
    held: set[str] = set()
    for names in groups.values():
        ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
        held.update(ranked[: math.ceil(HELD_OUT * len(ranked))])
    return frozenset(held)


def plain_code(code: str) -> str:
    """Upper-case code points without variation selectors."""
    return code.upper().replace("-FE0F", "")


def squeeze(text: str) -> str:
    """Letters and digits only, for names that differ in punctuation."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def clean(annotation: str) -> str:
    """Lower case, straight apostrophes, no bracketed remarks, details after a colon in words."""
    text = re.sub(r"\s*\(.*?\)", "", annotation.lower()).translate(_PLAIN).strip()
    subject, _, detail = text.partition(": ")
    if not detail:
        return text
    if subject == "family":
        each = [f"{article(member)} {member}" for member in detail.split(", ")]
        return f"family of {', '.join(each[:-1])} and {each[-1]}"
    if subject == "kiss":
        return f"kiss of {' and '.join(detail.split(', '))}"
    if subject == "couple with heart":
        return f"couple of {' and '.join(f'a {who}' for who in detail.split(', '))} with heart"
    if detail == "bald":
        return f"bald {subject}"
    if detail.startswith("facing"):
        return f"{subject} {detail}"
    return f"{subject} with {'a beard' if detail == 'beard' else detail}"


def phrase(name: str) -> tuple[str, bool]:
    """(noun phrase with its article, whether it is a plural) of a cleaned name."""
    if name.endswith(("o'clock", "-thirty")):
        return "a clock", False  # the hands of the animated ones turn
    text = _WANTS_ARTICLE.sub(r"\1 a \2", _PHRASES.get(name, name))
    if text.startswith("kiss of "):
        text = f"kissing {text.removeprefix('kiss of ')}"
    if text in _THE:
        return f"the {text}", False
    plural = _is_plural(text)
    if plural or re.fullmatch(_BARE, text):
        return text, plural
    return f"{article(text)} {text}", False


def article(text: str) -> str:
    """ "a" or "an", by how the first word sounds."""
    if re.match(r"(uni[cfv]|u-|eu|one\b|ewe|ufo|us[ei]|ok\b(?!.)|t-|ukulele)", text):
        return "a"
    return "an" if re.match(r"([aeiou]|hour|x-ray)", text) else "a"


def _is_plural(text: str) -> bool:
    if text == "palms up together":
        return True
    words = re.split(rf"\s(?:{_HEAD_ENDS})\b", text)[0].split()
    verbs = [i for i, word in enumerate(words) if i and word.endswith("ing")]
    head = words[verbs[0] - 1] if verbs else words[-1]
    if text == "flexed biceps":
        return False
    if head in ("skis", "people", "men", "women", "children", "teeth", "feet", "mice"):
        return True
    if text.startswith("kissing ") and " and " in text:
        return True
    return head.endswith("s") and not head.endswith(("ss", "us", "is", "os")) and len(head) > 3


def _design(row: Mapping[str, Any], held: frozenset[str]) -> Design:
    name = clean(row["annotation"])
    words, plural = phrase(name)
    tags = {tag.strip().lower() for tag in row["tags"].split(",")} - {""}
    return Design(
        code=plain_code(row["hexcode"]),
        name=name,
        phrase=words,
        plural=plural,
        group=row["group"],
        subgroup=row["subgroups"],
        tags=tuple(sorted(tags)),
        mirror=not _NO_MIRROR.search(name),
        held_out=name in held,
    )
