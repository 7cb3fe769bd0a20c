"""`optim.micro_batch` becomes the accumulation that all else knows: by the memory there is, where it says "auto".

A choice is saved with the checkpoints, and a run that goes on keeps it: so an interrupted run adds its gradients up in
the same order as one without interruption, whatever else is on the device by then.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from st_fast.core.checkpoint.history import candidates
from st_fast.core.checkpoint.store import read_manifest
from st_fast.core.errors import RunFailed
from st_fast.core.files import BadFile
from st_fast.core.ranks import Ranks
from st_fast.recipe import Recipe, RecipeError, cost
from st_fast.recipe.batch import AUTO, images_a_pass, possible_passes, with_passes_of
from st_fast.recipe.check import check
from st_fast.train.memory import capacity

WASTEFUL = 2
"""How many times the chosen pass would fit before the line says that the batch does not split better."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Choice:
    """What "auto" came to: images of a pass on each of `ranks`; `halved` once memory lacked all the same."""

    images: int
    ranks: int
    halved: bool = False


def choose_micro_batch(
    recipe: Recipe, ranks: Ranks, dtype: torch.dtype, kept: tuple[int, int], say: Say
) -> tuple[Recipe, Choice | None]:
    """The recipe with the accumulation that its `micro_batch` asks for, and the choice where it was left to us.

    `kept` are the bytes of data on the device, at least and at most: the estimate does not know of them. All ranks take
    what fits the one with the least memory. RunFailed where no image fits; RecipeError where what fits is excluded by
    another key. One line says what was chosen.
    """
    asked = recipe.optim.micro_batch
    if asked != AUTO:
        return (
            with_passes_of(images_a_pass(recipe.optim, ranks.count), recipe, ranks.count) if asked else recipe
        ), None
    bf16, whole = dtype == torch.bfloat16, capacity(ranks.device)
    room = least_room(ranks, whole - kept[0])
    choice = recorded(ranks.broadcast_from_rank0(lambda: newest_record(recipe)), recipe, ranks.count)
    again = choice is not None
    # With all of the memory, not the share, and the least data: what others take is not the same at every start.
    if choice is None or sum(estimate(recipe, choice, bf16)) > room:
        room = least_room(ranks, whole - kept[1])
        again, choice = False, Choice(cost.largest_micro_batch(recipe, ranks.count, bf16, room), ranks.count)
    if not choice.images:
        raise RunFailed(too_little(recipe, ranks, bf16, room))
    chosen = checked(recipe, choice)
    why = ", as before" if again else splits_badly(recipe, choice, bf16, room)
    say(described(recipe, choice, bf16, room) + why)
    return chosen, choice


def least_room(ranks: Ranks, mine: int) -> int:
    """The smallest of all ranks' bytes."""
    rooms = torch.zeros(ranks.count, dtype=torch.float64)
    rooms[ranks.rank] = max(mine, 0)
    return int(ranks.sum(rooms).min())


def checked(recipe: Recipe, choice: Choice) -> Recipe:
    """The recipe with the choice as its accumulation; RecipeError where another key excludes that."""
    chosen = with_passes_of(choice.images, recipe, choice.ranks)
    try:
        check(chosen, choice.ranks)
    except RecipeError as error:
        place = f'optim.micro_batch = "auto": by the memory there is, {choice.images} images a pass'
        raise error.at(place) from None
    return chosen


def estimate(recipe: Recipe, choice: Choice, bf16: bool) -> tuple[int, int]:
    """(Weights with their state, activations) in bytes, as `cost.memory_bytes` has them."""
    return cost.memory_bytes(with_passes_of(choice.images, recipe, choice.ranks), choice.ranks, bf16)


def described(recipe: Recipe, choice: Choice, bf16: bool, room: int) -> str:
    """The choice in one line, with what it should take."""
    passes = recipe.optim.batch_size // (choice.ranks * choice.images)
    taken = sum(estimate(recipe, choice, bf16)) / 2**30
    return (
        f"micro-batch {choice.images}: {passes} pass{'es' * (passes != 1)} a step; "
        f"by estimate {taken:.1f} of {room / 2**30:.1f} GiB"
    )


def splits_badly(recipe: Recipe, choice: Choice, bf16: bool, room: int) -> str:
    """The end of that line where far more images would fit than a choice that divides a rank's share has; else ""."""

    def taken(images: int) -> int:
        whole = replace(recipe.optim, batch_size=images * choice.ranks, accumulation=1, micro_batch=0)
        return sum(cost.memory_bytes(replace(recipe, optim=whole), choice.ranks, bf16))

    share = recipe.optim.batch_size // choice.ranks
    sizes = range(choice.images + 1, share + 1)
    fit = choice.images + bisect_right(sizes, cost.MEMORY_SHARE * room, key=taken)
    if fit <= WASTEFUL * choice.images:
        return ""
    return f"; {fit} would fit, but a pass must divide the {share} images of a rank"


def too_little(recipe: Recipe, ranks: Ranks, bf16: bool, room: int) -> str:
    """The line where not one image fits."""
    fixed, activations = estimate(recipe, Choice(1, ranks.count), bf16)
    share = f"{100 * cost.MEMORY_SHARE:.0f} % of {room / 2**30:.2f} GiB"
    return (
        f'optim.micro_batch = "auto": {ranks.device} has too little memory for one image a pass: {share} may be '
        f"planned with, weights and state take {fixed / 2**30:.2f} GiB and the image {activations / 2**20:.1f} MiB; "
        'take a smaller model, or more ranks with run.sharding = "fsdp2"; optim.micro_batch = 1 tries it all the same'
    )


def halved(recipe: Recipe, choice: Choice | None) -> tuple[Recipe, Choice] | None:
    """The next smaller choice for a pass that was too large, once; None where nobody may choose.

    Several ranks can't agree in the middle of a step, and what another key excludes is no choice.
    """
    if choice is None or choice.halved or choice.ranks > 1:
        return None
    smaller = [images for images in possible_passes(recipe.optim, 1) if images < choice.images]
    if not smaller:
        return None
    less = replace(choice, images=smaller[0], halved=True)
    try:
        return checked(recipe, less), less
    except RecipeError:
        return None


def newest_record(recipe: Recipe) -> dict[str, Any] | None:
    """What the newest checkpoint of the run says of its choice; None where there is no checkpoint, or no choice."""
    for stage in reversed(recipe.stages):
        for candidate in candidates(Path(recipe.run.out) / stage.name / "checkpoints"):
            try:
                found = read_manifest(candidate.path).meta.get("micro_batch")
            except BadFile:  # whoever loads it says so
                continue
            return found if isinstance(found, dict) else None
    return None


def recorded(record: Mapping[str, Any] | None, recipe: Recipe, ranks: int) -> Choice | None:
    """A record as a choice; None unless it was made for as many ranks and still divides their share."""
    try:
        choice = Choice(**record) if record else None
    except TypeError:  # another version's
        return None
    fits = choice is not None and choice.ranks == ranks and choice.images in possible_passes(recipe.optim, ranks)
    return choice if fits else None


def record(choice: Choice | None) -> dict[str, Any] | None:
    """The choice as a checkpoint keeps it."""
    return None if choice is None else asdict(choice)
