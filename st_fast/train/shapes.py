"""What a run does about latents of several shapes: whether they fit its network and memory, and what they cost."""

from dataclasses import astuple, replace

import numpy as np

from st_fast.core.errors import UserError
from st_fast.data.ahead import RecordSet
from st_fast.data.buckets import BucketSet
from st_fast.recipe import Recipe
from st_fast.recipe.cost import StageCost, stage_cost
from st_fast.recipe.error import show, wrong_value
from st_fast.recipe.schema import Stage

PERCENT_APART = 15
"""How far the tokens of a shape may lie from those of the recipe's own, in percent of these. A batch is as many images
of whatever shape, so that costs, and what a step learns, would differ as much."""


def check_shapes(recipe: Recipe, records: BucketSet) -> None:
    """UserError unless every shape divides into patches and has about as many tokens as the recipe's own.

    Also for what takes one shape only, where the recipe asks for it.
    """
    model, odd, apart = recipe.model, list[str](), list[str]()
    for name, part in records.sets.items():
        height, width = part.manifest.shape[1:]
        rows, columns = height // model.patch, width // model.patch
        if height % model.patch or width % model.patch:
            odd.append(f"{name} ({height} x {width})")
        elif 100 * abs(rows * columns - model.tokens) > PERCENT_APART * model.tokens:
            apart.append(f"{name} ({rows} x {columns} = {rows * columns})")
    if odd:
        raise UserError(f"{records.folder}: model.patch = {model.patch} does not divide latents of {', '.join(odd)}")
    if apart:
        raise UserError(
            f"{records.folder}: model.latent_size = {show(model.latent_size)} with patch {model.patch} makes "
            f"{model.tokens} tokens; more than {PERCENT_APART} % from it are {', '.join(apart)}: set "
            "model.latent_size to the size of the --buckets, or prepare others"
        )
    for stage in recipe.stages:
        for part in records.parts:
            model = stage.method.network(_of_shape(recipe, *part.manifest.shape[1:]).model)
            stage.routing.check(stage.name, model, stage.method)
    several = f"{records.folder} has latents of {len(records.parts)} shapes"
    if recipe.run.graphs:
        raise wrong_value("run.cuda_graphs", True, '"auto" or false', f"a graph is of one shape, {several}")
    if recipe.run.fp8 != "off":
        why = f"{several}, whose tokens need not be multiples of what fp8 takes"
        raise wrong_value("run.fp8", recipe.run.fp8, '"off"', why)
    if recipe.data.loader == "dali":
        raise wrong_value("data.loader", "dali", '"auto", "torch" or "resident"', several)


def mean_cost(recipe: Recipe, stage: Stage, records: RecordSet, encoders: float | None = None) -> StageCost:
    """A stage's FLOPs per image; of latents of several shapes their mean, as often as each is trained on."""
    if not isinstance(records, BucketSet):
        return stage_cost(recipe, stage, encoders)
    found = [
        stage_cost(_of_shape(recipe, part.manifest.shape[1], part.manifest.shape[2]), stage, encoders)
        for part in records.parts
    ]
    parts = [astuple(cost) for cost in found]
    return StageCost(*np.average(parts, axis=0, weights=records.counts).tolist())


def _of_shape(recipe: Recipe, height: int, width: int) -> Recipe:
    return replace(recipe, model=replace(recipe.model, latent_size=(height, width)))


def with_largest_shape(recipe: Recipe, records: RecordSet) -> Recipe:
    """The recipe with latents of the shape that takes most memory, for estimates of it."""
    if not isinstance(records, BucketSet):
        return recipe
    sides = [(part.manifest.shape[1], part.manifest.shape[2]) for part in records.parts]
    largest = max([recipe.model.latent_sides, *sides], key=lambda pair: pair[0] * pair[1])
    return _of_shape(recipe, *largest)
