"""Icon sets in Iconify's format: licences, which design an icon draws, SVG text and pixels."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.data import packages
from scripts.data.names import Catalogue, Design, squeeze

PERMITTED = ("MIT", "Apache-2.0")
_TONE = re.compile(r"(-(medium-)?(light|dark)|-medium)?(-skin-tone|-tone\d)?$")


@dataclass(frozen=True)
class Drawing:
    """A picture of a design in one style: an SVG text or the content of an image file."""

    name: str
    design: str
    source: str
    content: bytes
    svg: bool


def one_each(drawings: Iterable[Drawing]) -> list[Drawing]:
    """One drawing for each design, sorted by design: the one whose name's hash comes first."""
    best: dict[str, Drawing] = {}
    for drawing in drawings:
        held = best.get(drawing.design)
        if held is None or _rank(drawing.name) < _rank(held.name):
            best[drawing.design] = drawing
    return [best[code] for code in sorted(best)]


def renders(tarball: Path, names: Catalogue) -> list[Drawing]:
    """The 3-D renders, one for each design."""
    found = []
    for filename, content in packages.members(tarball, ".webp"):
        stem = filename.removesuffix(".webp")
        design = names.design_of(stem)
        if design is not None:
            source = packages.RENDERS.name
            found.append(Drawing(f"3d-{stem}", design.code, source, content, svg=False))
    return one_each(found)


def read_icon_set(tarball: Path, prefix: str) -> dict[str, Any]:
    """One icon set of `@iconify/json`.

    Raises:
        RuntimeError: its licence is none of `PERMITTED`.
    """
    licence = json.loads(packages.read(tarball, "collections.json"))[prefix]["license"]["spdx"]
    if licence not in PERMITTED:
        raise RuntimeError(
            f"Expected the icon set {prefix} under one of {PERMITTED}, got {licence}. Leave it out."
        )
    return json.loads(packages.read(tarball, f"json/{prefix}.json"))


def icons(
    icon_set: Mapping[str, Any], names: Catalogue, aliases: Mapping[str, str]
) -> list[Drawing]:
    """The icons of a set, one for each design; icons of unknown designs are left out.

    Args:
        icon_set: As `read_icon_set` returns it.
        names: The designs.
        aliases: Design codes by squeezed icon name, as `code_points` collects them.
    """
    known = {name: design.code for name, design in names.by_name().items()}
    prefix = icon_set["prefix"]
    found = []
    for icon, body in icon_set["icons"].items():
        bare = squeeze(_TONE.sub("", icon))
        code = aliases.get(squeeze(icon)) or aliases.get(bare) or known.get(bare)
        if code is not None:
            svg = _svg(body, icon_set).encode()
            source = f"{packages.ICONS.name}:{prefix}"
            found.append(Drawing(f"{prefix}-{icon}", code, source, svg, svg=True))
    return one_each(found)


def code_points(icon_sets: Iterable[Mapping[str, Any]], names: Catalogue) -> dict[str, str]:
    """Design code by squeezed icon name, from the sets that list their code points."""
    found: dict[str, str] = {}
    for icon_set in icon_sets:
        for code, icon in icon_set.get("chars", {}).items():
            design: Design | None = names.design_of(code)
            if design is not None:
                found.setdefault(squeeze(icon), design.code)
    return found


def rasterise(svg: bytes, side: int) -> bytes:
    """PNG file of an SVG, `side` pixels square."""
    import resvg_py  # only the builder needs it

    return bytes(resvg_py.svg_to_bytes(svg_string=svg.decode(), width=side, height=side))


def _svg(icon: Mapping[str, Any], icon_set: Mapping[str, Any]) -> str:
    width = icon.get("width", icon_set.get("width", 16))
    height = icon.get("height", icon_set.get("height", 16))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )


def _rank(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
