"""The recipe: one TOML file that describes a whole experiment. Imports no torch, so mistakes are told at once."""

from st_fast.recipe.check import changed_maths
from st_fast.recipe.error import RecipeError
from st_fast.recipe.load import from_text, load, load_run, to_toml
from st_fast.recipe.schema import Recipe, Stage

__all__ = ["Recipe", "RecipeError", "Stage", "changed_maths", "from_text", "load", "load_run", "to_toml"]
