"""The designs: names, groups, files and which are held out.

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

from scripts.data.phrases import clean, phrase

HELD_OUT = 0.08  # share of the designs of every group that training never sees
SKIPPED_GROUPS = ("flags", "component", "extras-openmoji", "extras-unicode")
SKIPPED_NAMES = ("middle finger",)  # no picture to show by chance
SIGNS_KEPT = ("geometric",)  # subgroups of "symbols" whose pictures are no writing

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

    def choose(self, stems: Iterable[str]) -> dict[str, str]:
        """One of the file stems `stems` ("1f44b-1f3fb") for each design, by code and sorted.

        Of a design's skin tones it is the one whose SHA-256 comes first. Stems of flags and of
        unknown code points are left out.
        """
        tones: dict[str, list[str]] = defaultdict(list)
        for stem in stems:
            design = self.design_of(stem)
            if design is not None:
                tones[design.code].append(stem)
        return {code: min(tones[code], key=_rank) for code in sorted(tones)}


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
        ranked = sorted(names, key=_rank)
        held.update(ranked[: math.ceil(HELD_OUT * len(ranked))])
    return frozenset(held)


def plain_code(code: str) -> str:
    """Upper-case code points without variation selectors."""
    return code.upper().replace("-FE0F", "")


def _rank(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


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
