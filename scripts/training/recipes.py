"""All recipes by name."""

from __future__ import annotations

from collections.abc import Mapping

from scripts.training.recipe import Recipe
from scripts.training.tiny_image import TINY_IMAGE, TOY_IMAGE
from scripts.training.tiny_video import TINY_VIDEO, TOY

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe for recipe in (TINY_VIDEO, TINY_IMAGE, TOY, TOY_IMAGE)
}
