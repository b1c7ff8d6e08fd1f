"""Compression: recipes, passes, and the way from one checkpoint to another, tensor by tensor."""

from fourfold.compress.file_to_file import quantize
from fourfold.compress.planning import DryRun, plan
from fourfold.compress.recipe import Recipe, load_recipe, recipe_names

__all__ = ["DryRun", "Recipe", "load_recipe", "plan", "quantize", "recipe_names"]
