"""How the global batch is split: over ranks, over passes of a step, and so into images of a pass. Imports no torch."""

import math
from dataclasses import replace

from st_fast.recipe.error import show, wrong_value
from st_fast.recipe.schema import Optim, Recipe

AUTO = "auto"
"""The `optim.micro_batch` that the device's memory decides."""


def images_a_pass(optim: Optim, ranks: int) -> int:
    """Images of one forward pass on one rank; while "auto" is undecided, those of a rank's whole share."""
    if isinstance(optim.micro_batch, int) and optim.micro_batch:
        return optim.micro_batch
    return optim.batch_size // (ranks * optim.accumulation)


def possible_passes(optim: Optim, ranks: int) -> list[int]:
    """The images that a pass may have, largest first: what divides a rank's share of the batch evenly."""
    share = optim.batch_size // ranks
    most = min(math.isqrt(share), 65_536)  # more than passes ever are, so that a huge batch costs no time
    small = [n for n in range(1, most + 1) if share % n == 0]
    return sorted({*small, *(share // n for n in small)}, reverse=True)


def with_passes_of(images: int, recipe: Recipe, ranks: int) -> Recipe:
    """The recipe with the accumulation that makes passes of so many images, and nothing left to decide."""
    accumulation = recipe.optim.batch_size // (ranks * images)
    return replace(recipe, optim=replace(recipe.optim, accumulation=accumulation, micro_batch=0))


def made_for(recipe: Recipe) -> int:
    """A number of ranks with which the batch splits as the recipe says: more than one only where it must be."""
    optim = recipe.optim
    if recipe.run.graphs and isinstance(optim.micro_batch, int) and optim.micro_batch:
        return max(1, optim.batch_size // optim.micro_batch)  # a graph is of one pass: the pass is a rank's whole share
    return 1


def agreed(recipe: Recipe, ranks: int) -> Recipe:
    """The recipe with `micro_batch` alone to decide where `accumulation` says the same; RecipeError if it does not."""
    optim = recipe.optim
    if optim.micro_batch == 0 or optim.accumulation == 1:
        return recipe
    if optim.micro_batch != AUTO and ranks * optim.accumulation * images_a_pass(optim, ranks) == optim.batch_size:
        return replace(recipe, optim=replace(optim, accumulation=1))
    why = f"optim.micro_batch = {show(optim.micro_batch)} decides how many passes a step has"
    raise wrong_value("optim.accumulation", optim.accumulation, "1, or optim.micro_batch = 0", why)
