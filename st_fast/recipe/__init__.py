"""The recipe: one TOML file that describes a whole experiment. Imports no torch, so mistakes are told at once."""

from st_fast.recipe.check import changed_maths
from st_fast.recipe.error import RecipeError
from st_fast.recipe.load import load, load_run, to_toml
from st_fast.recipe.methods import (
    METHODS,
    LayerSync,
    Method,
    Plain,
    Repa,
    SelfRepresentation,
    SelfTranscendence,
    VelocityHead,
)
from st_fast.recipe.schema import Data, Evaluate, Flow, Kernels, Model, Optim, Recipe, Run, Sample, Stage, Start

__all__ = [
    "METHODS",
    "Data",
    "Evaluate",
    "Flow",
    "Kernels",
    "LayerSync",
    "Method",
    "Model",
    "Optim",
    "Plain",
    "Recipe",
    "RecipeError",
    "Repa",
    "Run",
    "Sample",
    "SelfRepresentation",
    "SelfTranscendence",
    "Stage",
    "Start",
    "VelocityHead",
    "changed_maths",
    "load",
    "load_run",
    "to_toml",
]
