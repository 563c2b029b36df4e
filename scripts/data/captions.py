"""English captions of scenes: exactly what is seen, in varied words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from scripts.data import backgrounds, motions, palette
from scripts.data.backgrounds import Backgrounds
from scripts.data.names import Design
from scripts.data.phrases import article
from scripts.data.scenes import FRAMINGS, MOST, Floats, Scenes
from scripts.data.sprites import Sprites

T = TypeVar("T")

# (third person, plural, -ing form, rest) of each action.
ACTION_WORDS: dict[str, tuple[tuple[str, str, str, str], ...]] = {
    "left": (
        ("moves", "move", "moving", "left"),
        ("moves", "move", "moving", "to the left"),
        ("slides", "slide", "sliding", "from right to left"),
        ("drifts", "drift", "drifting", "to the left"),
    ),
    "right": (
        ("moves", "move", "moving", "right"),
        ("moves", "move", "moving", "to the right"),
        ("slides", "slide", "sliding", "from left to right"),
        ("drifts", "drift", "drifting", "to the right"),
    ),
    "up": (
        ("moves", "move", "moving", "up"),
        ("rises", "rise", "rising", ""),
        ("floats", "float", "floating", "upwards"),
    ),
    "down": (
        ("moves", "move", "moving", "down"),
        ("falls", "fall", "falling", ""),
        ("sinks", "sink", "sinking", "downwards"),
    ),
    "arc left": (
        ("jumps", "jump", "jumping", "to the left"),
        ("flies", "fly", "flying", "in an arc to the left"),
    ),
    "arc right": (
        ("jumps", "jump", "jumping", "to the right"),
        ("flies", "fly", "flying", "in an arc to the right"),
    ),
    "bounce": (
        ("bounces", "bounce", "bouncing", ""),
        ("bounces", "bounce", "bouncing", "up and down"),
        ("hops", "hop", "hopping", "up and down"),
    ),
    "circle": (
        ("moves", "move", "moving", "in a circle"),
        ("circles", "circle", "circling", "around"),
        ("goes", "go", "going", "round in circles"),
    ),
    "spin": (
        ("spins", "spin", "spinning", ""),
        ("spins", "spin", "spinning", "around"),
        ("rotates", "rotate", "rotating", ""),
    ),
    "swing": (
        ("swings", "swing", "swinging", "from side to side"),
        ("rocks", "rock", "rocking", "back and forth"),
        ("tilts", "tilt", "tilting", "left and right"),
    ),
    "shake": (
        ("shakes", "shake", "shaking", ""),
        ("trembles", "tremble", "trembling", ""),
    ),
    "zoom in": (
        ("comes", "come", "coming", "closer"),
        ("grows", "grow", "growing", ""),
        ("gets", "get", "getting", "bigger"),
    ),
    "zoom out": (
        ("moves", "move", "moving", "away"),
        ("shrinks", "shrink", "shrinking", ""),
        ("gets", "get", "getting", "smaller"),
    ),
}


def write_captions(
    rng: np.random.Generator, scenes: Scenes, sprites: Sprites, frames: int, half: Floats
) -> list[str]:
    """One caption for each scene.

    Args:
        rng: Source of randomness, for the wording alone.
        scenes: What is seen.
        sprites: The set that the scenes refer to.
        frames: Length of the clip; stills get captions without motion.
        half: float [2], half the width and height in units of the shorter side.
    """
    design_of = sprites.design_of.tolist()
    places = scenes.moves.home[::MOST] / half
    captions = []
    for i, count in enumerate(scenes.count.tolist()):
        rows = scenes.sprite[i, :count].tolist()
        designs = [sprites.designs[design_of[row]] for row in rows]
        words = Wording(rng.random(10).tolist())
        if count > 1:
            what = _several(words, scenes, i, designs)
        else:
            own = sprites.motions[rows[0]] if frames >= motions.FEWEST_FRAMES else ""
            what = _single(words, scenes, i, designs[0], own, places[i].tolist())
        captions.append(_on_background(words, what, scenes.background, i))
    return captions


class Wording:
    """Chooses words by numbers in [0, 1) that were drawn beforehand, one after the other."""

    def __init__(self, draws: Sequence[float]) -> None:
        self._draws = iter(draws)

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[int(next(self._draws) * len(options))]

    def maybe(self, chance: float) -> bool:
        """True with the given probability."""
        return next(self._draws) < chance


def _single(
    words: Wording, scenes: Scenes, i: int, design: Design, own: str, place: Sequence[float]
) -> str:
    action = scenes.action(i, 0)
    framing = FRAMINGS[scenes.framing[i]]
    subject = design.phrase
    if framing == "close-up":
        subject = f"{words.pick(('a close-up of', 'a close view of'))} {subject}"
    elif framing == "small" and action not in ("zoom in", "zoom out") and words.maybe(0.8):
        subject = _with_adjective(words.pick(("small", "small", "tiny", "little")), design)
    if action == "still":
        if framing == "usual" and words.maybe(0.12):
            subject = _without_article(design)
        if own and words.maybe(0.5):
            return f"{subject} {own}"
        where = _place(place) if framing != "close-up" else ""
        return f"{subject} {where}" if where and words.maybe(0.6) else subject
    singular, plural, participle, rest = words.pick(ACTION_WORDS[action])
    if framing != "close-up" and words.maybe(0.12):
        return _joined(_without_article(design), participle, rest)
    form = words.pick(("verb", "participle"))
    verb = participle if form == "participle" else plural if design.plural else singular
    pace = _pace(scenes, i) if words.maybe(0.6) else ""
    return _joined(subject, verb, rest, pace)


def _several(words: Wording, scenes: Scenes, i: int, designs: Sequence[Design]) -> str:
    phrases = [design.phrase for design in designs]
    actions = [scenes.action(i, k) for k in range(len(designs))]
    if len(set(actions)) > 1:
        doing = [_doing(words, p, a) for p, a in zip(phrases, actions, strict=True)]
        return _listed(doing)
    alike = "" if actions[0] == "still" else _joined(*words.pick(ACTION_WORDS[actions[0]])[2:])
    if len(designs) == 2 and words.maybe(0.5):
        first, second = phrases
        if scenes.stacked:
            joined = words.pick((f"{first} above {second}", f"{second} below {first}"))
        else:
            joined = words.pick(
                (
                    f"{first} next to {second}",
                    f"{first} to the left of {second}",
                    f"{second} to the right of {first}",
                    f"{first} beside {second}",
                )
            )
        return f"{joined}, both {alike}" if alike else joined
    listed = _listed(phrases)
    if not scenes.stacked and not alike and words.maybe(0.2):
        return f"{listed} in a row"
    return _joined(listed, alike)


def _doing(words: Wording, phrase: str, action: str) -> str:
    return phrase if action == "still" else _joined(phrase, *words.pick(ACTION_WORDS[action])[2:])


def _on_background(words: Wording, what: str, background: Backgrounds, i: int) -> str:
    if words.maybe(0.12):
        return what
    where = _background(words, background, i)
    return f"{where}, {what}" if words.maybe(0.08) else f"{what} {where}"


def _background(words: Wording, background: Backgrounds, i: int) -> str:
    a, b = palette.NAMES[background.first[i]], palette.NAMES[background.second[i]]
    lines = backgrounds.DIRECTIONS[background.direction[i]]
    ways: dict[str, tuple[str, ...]] = {
        "plain": (f"on a {a} background", f"over {a}", f"on a plain {a} background", f"on {a}"),
        "gradient": (f"on a {a} and {b} gradient", f"over a gradient of {a} and {b}"),
        "glow": (
            f"on a {b} background with a {a} glow",
            f"over a {a} glow on a {b} background",
        ),
        "stripes": (
            f"on {a} and {b} stripes",
            f"on a striped {a} and {b} background",
            f"over {lines} {a} and {b} stripes",
        ),
        "checker": (f"on a {a} and {b} checkerboard", f"over {a} and {b} checks"),
        "dots": (f"on a {a} background with {b} dots", f"over {b} dots on {a}"),
        "clouds": (
            f"on a cloudy {a} and {b} background",
            f"over soft {a} and {b} clouds",
        ),
        "ground": (
            f"under a {a} sky over {b} ground",
            f"in front of {b} ground and a {a} sky",
        ),
        "night": (
            f"in a {a} night sky with stars",
            f"among stars on a {a} sky",
            f"in a starry {a} night",
        ),
    }
    text = words.pick(ways[backgrounds.KINDS[background.kind[i]]])
    return text.replace(" a orange", " an orange")


def _place(place: Sequence[float]) -> str:
    x, y = place
    across = "on the left" if x < -0.3 else "on the right" if x > 0.3 else ""
    along = "at the top" if y < -0.3 else "at the bottom" if y > 0.3 else ""
    return f"{along} {across.removeprefix('on the ')}" if across and along else across or along


def _pace(scenes: Scenes, i: int) -> str:
    if scenes.action(i, 0) not in ("bounce", "circle", "spin", "swing"):
        return ""
    speed = scenes.moves.speed()[i * MOST]
    return "slowly" if speed < 0.7 else "quickly" if speed > 1.5 else ""


def _with_adjective(adjective: str, design: Design) -> str:
    bare = _without_article(design)
    if bare == design.phrase:
        return f"{adjective} {bare}"
    return f"{article(adjective)} {adjective} {bare}"


def _without_article(design: Design) -> str:
    first, _, rest = design.phrase.partition(" ")
    return rest if first in ("a", "an", "the") and rest else design.phrase


def _listed(phrases: Sequence[str]) -> str:
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)
