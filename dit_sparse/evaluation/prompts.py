"""Fixed prompts that no training scene says.

Training of the embedded models never shows a design and an action over one kind of background (see
`scripts/data/scenes.py`); each prompt here names just such a composition, of a design that training
does show.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """A prompt and why it is held out.

    Attributes:
        text: What a model is asked for.
        design: Name of the design that comes first in it.
        action: What that one does, of `ACTIONS` in `scripts/data/motions.py`.
        background: The kind of background that training never shows with both.
    """

    text: str
    design: str
    action: str
    background: str


CLIPS = (
    Prompt("a cow moving right under a light blue sky over green ground", "cow", "right", "ground"),
    Prompt("a rocket rises on a purple and orange gradient", "rocket", "up", "gradient"),
    Prompt("a flame bounces under an orange sky over brown ground", "fire", "bounce", "ground"),
    Prompt("a rainbow floating upwards in a starry dark blue night", "rainbow", "up", "night"),
    Prompt("a ghost spins over soft lavender and white clouds", "ghost", "spin", "clouds"),
    Prompt(
        "a snowman rocks back and forth among stars on a black sky", "snowman", "swing", "night"
    ),
    Prompt(
        "an octopus circling around under a cyan sky over beige ground",
        "octopus",
        "circle",
        "ground",
    ),
    Prompt(
        "a red heart comes closer on a white background with a pink glow",
        "red heart",
        "zoom in",
        "glow",
    ),
    Prompt(
        "an automobile moves left on a yellow background with blue dots",
        "automobile",
        "left",
        "dots",
    ),
    Prompt(
        "a butterfly flying in an arc to the left on a teal background with white dots",
        "butterfly",
        "arc left",
        "dots",
    ),
    Prompt(
        "a smiling face with heart-eyes hops up and down on a light blue background with pink dots",
        "smiling face with heart-eyes",
        "bounce",
        "dots",
    ),
    Prompt("a honeybee falls on an orange and yellow gradient", "honeybee", "down", "gradient"),
    Prompt(
        "a chicken gets smaller on a white background with green dots",
        "chicken",
        "zoom out",
        "dots",
    ),
    Prompt(
        "a panda and a unicorn rocking back and forth on a plain green background",
        "panda",
        "swing",
        "plain",
    ),
    Prompt(
        "a crab next to a frog, both bouncing up and down in a purple night sky with stars",
        "crab",
        "bounce",
        "night",
    ),
    Prompt(
        "a teddy bear to the left of a jack-o-lantern, both spinning on a plain cyan background",
        "teddy bear",
        "spin",
        "plain",
    ),
)

STILLS = (
    Prompt("a cow on a green and white gradient", "cow", "still", "gradient"),
    Prompt("a rocket on red and white stripes", "rocket", "still", "stripes"),
    Prompt("a red apple under a light blue sky over green ground", "red apple", "still", "ground"),
    Prompt("a cat face in a purple night sky with stars", "cat face", "still", "night"),
    Prompt("a rainbow among stars on a dark blue sky", "rainbow", "still", "night"),
    Prompt("a ghost on a plain orange background", "ghost", "still", "plain"),
    Prompt("a pizza on a black background with an orange glow", "pizza", "still", "glow"),
    Prompt("a hamburger on a teal background with white dots", "hamburger", "still", "dots"),
    Prompt("a crescent moon on a blue and white checkerboard", "crescent moon", "still", "checker"),
    Prompt(
        "a small helicopter on a yellow background with red dots", "helicopter", "still", "dots"
    ),
    Prompt("a close-up of a tiger on a plain light blue background", "tiger", "still", "plain"),
    Prompt("a doughnut in a starry dark green night", "doughnut", "still", "night"),
    Prompt("a red heart in front of beige ground and a cyan sky", "red heart", "still", "ground"),
    Prompt("a cactus over lavender", "cactus", "still", "plain"),
    Prompt(
        "a pineapple to the left of a panda on green and black stripes",
        "pineapple",
        "still",
        "stripes",
    ),
    Prompt(
        "a cherry blossom, a butterfly and a snail in a row over soft pink and white clouds",
        "cherry blossom",
        "still",
        "clouds",
    ),
)


def fixed_prompts(frames: int) -> tuple[str, ...]:
    """The fixed prompts for clips of several frames, or for pictures."""
    return tuple(prompt.text for prompt in (CLIPS if frames > 1 else STILLS))
