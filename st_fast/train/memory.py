"""Memory: how much there is, how many images a pass may have, and what happens where it does not suffice.

`optim.micro_batch` becomes the accumulation that the rest of the trainer knows. A choice made by "auto" is saved with
the checkpoints and kept by a resumed run, so that it adds its gradients up in the same order as one that was never
interrupted, whatever else is on the device by then.
"""

import os
import re
import resource
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from traceback import clear_frames

import torch

from st_fast.core.checkpoint.meta import MicroBatch
from st_fast.core.errors import RunFailed
from st_fast.core.machine import PassTooLarge, container_limit, lacks_memory, local_count, out_of_memory
from st_fast.core.ranks import Ranks
from st_fast.recipe import Recipe, RecipeError, cost
from st_fast.recipe.batch import AUTO, images_a_pass, possible_passes, with_passes_of
from st_fast.recipe.check import check

STEP = ("step", "all-reduce", "graphs")
"""Phases whose memory goes with the images of a pass."""
DOING = {
    "build": "making the model and its optimiser state",
    "data": "reading a batch", "read": "reading a checkpoint or a model", "save": "saving a checkpoint",
    "log": "reading the losses", "agree": "agreeing with the other ranks", "sample": "drawing or scoring",
}  # fmt: skip
"""What a rank does in the other ones, as messages have it."""
WASTEFUL = 2
"""How many times the chosen pass must fit before the log says that the batch does not split better."""


@contextmanager
def explained(recipe: Recipe, ranks: Ranks, dtype: torch.dtype, given: Recipe | None = None) -> Iterator[None]:
    """Turns a lack of memory inside the block into a RunFailed: of a step, with what would fit (`advice`)."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        at = ranks.heartbeat
        if isinstance(error, PassTooLarge) or at.phase in STEP:
            raise RunFailed(advice(recipe, ranks, dtype, capacity(ranks.device), given)) from error
        doing = DOING.get(at.phase, at.phase)
        raise RunFailed(out_of_memory(error, f"{doing}, at {at.stage} step {at.step}")) from error


@contextmanager
def of_a_pass() -> Iterator[None]:
    """Turns a lack of memory inside the block into PassTooLarge, which keeps nothing of what the pass has allocated."""
    lack = ""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        lack = str(error) or type(error).__name__
        clear_frames(error.__traceback__)
    if lack:
        raise PassTooLarge(lack) from None


def capacity(device: torch.device) -> int:
    """Bytes that this process may use: a GPU's memory that is free or its own; on a CPU its limit or share of RAM."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    whole = min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), container_limit()) // local_count()
    if limit == resource.RLIM_INFINITY:
        return whole
    # A limit on the address space also counts what programs and libraries take.
    status = Path("/proc/self/status")
    code = re.findall(r"^Vm(?:Lib|Exe):\s*(\d+)", status.read_text(), re.M) if status.exists() else ()  # else not Linux
    return min(limit - 1024 * sum(map(int, code)), whole)


def peak_bytes(device: torch.device) -> int:
    """The most memory in use: on a GPU that of tensors since the stage began, on a CPU that of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * (1 if sys.platform == "darwin" else 1024)  # macOS counts bytes


def advice(recipe: Recipe, ranks: Ranks, dtype: torch.dtype, room: int, given: Recipe | None = None) -> str:
    """One line: where memory ran out, what was asked for, and the option with which it should fit.

    `given` is the user's recipe where `recipe` has a choice of this module in it.
    """
    optim, bf16 = recipe.optim, dtype == torch.bfloat16
    now = images_a_pass(optim, ranks.count)
    fixed, activations = cost.memory_bytes(recipe, ranks.count, bf16)
    an_image = activations // now
    # `now` is known not to fit.
    fits = min(now - 1, max(0, int((cost.MEMORY_SHARE * room - fixed) / an_image)))
    micro = next((images for images in possible_passes(optim, ranks.count) if images <= fits), None)
    less = "" if recipe.run.checkpointing == "block" else ", or --run.checkpointing=block, which keeps less an image"
    where = f"{ranks.heartbeat.stage} step {ranks.heartbeat.step}" if ranks.heartbeat.stage else "start"
    line = (
        f"out of memory on {ranks.device} at {where} with {now} images a pass in {room / 2**30:.2f} GiB; by estimate "
        f"{fits} fit (weights and state {fixed / 2**30:.2f} GiB + {an_image / 2**20:.1f} MiB an image)"
    )
    if micro is None:
        return f"{line}: take more ranks or a smaller model{less}"
    option = f"--optim.micro_batch={micro}"
    if (given or recipe).optim.accumulation > 1:
        option = f"--optim.accumulation={optim.batch_size // (ranks.count * micro)}"
    options = option + " --run.cuda_graphs=false" * recipe.run.graphs
    return f"{line}: {options} makes it {micro} a pass, with the same mathematics{less}"


def choose_micro_batch(
    recipe: Recipe, ranks: Ranks, dtype: torch.dtype, kept: tuple[int, int], say: Callable[[str], None]
) -> tuple[Recipe, MicroBatch | None]:
    """The recipe with the accumulation that its `micro_batch` asks for, and the choice where that is "auto".

    `kept`: the least and the most bytes of data on the device, which the estimate leaves out. All ranks take what fits
    the one with the least memory. RunFailed if no image fits; RecipeError if another key excludes what fits.
    """
    optim, bf16 = recipe.optim, dtype == torch.bfloat16
    if optim.micro_batch != AUTO:
        images = images_a_pass(optim, ranks.count)
        return with_passes_of(images, recipe, ranks.count) if optim.micro_batch else recipe, None
    whole = capacity(ranks.device)
    room = least_room(ranks, whole - kept[0])
    choice: MicroBatch | None = ranks.broadcast_from_rank0(lambda: recorded(recipe, ranks.count))
    again = choice is not None
    # With all of the memory, not the share, and the least data: what others take is not the same at every start.
    if choice is None or sum(estimate(recipe, choice, bf16)) > room:
        room = least_room(ranks, whole - kept[1])
        again, choice = False, MicroBatch(cost.largest_micro_batch(recipe, ranks.count, bf16, room), ranks.count)
    if not choice.images:
        fixed, activations = estimate(recipe, MicroBatch(1, ranks.count), bf16)
        share = f"{100 * cost.MEMORY_SHARE:.0f} % of {room / 2**30:.2f} GiB"
        raise RunFailed(
            f'optim.micro_batch = "auto": {ranks.device} has too little memory for one image a pass: {share} may be '
            f"planned with, weights and state take {fixed / 2**30:.2f} GiB and the image {activations / 2**20:.1f} MiB"
            '; take a smaller model, or more ranks with run.sharding = "fsdp2"; '
            "optim.micro_batch = 1 tries it all the same"
        )
    chosen = checked(recipe, choice)
    passes, taken = chosen.optim.accumulation, sum(estimate(recipe, choice, bf16)) / 2**30
    say(
        f"micro-batch {choice.images}: {passes} pass{'es' * (passes != 1)} a step; "
        f"by estimate {taken:.1f} of {room / 2**30:.1f} GiB"
        + (", as before" if again else splits_badly(recipe, choice, bf16, room))
    )
    return chosen, choice


def least_room(ranks: Ranks, mine: int) -> int:
    """The smallest of all ranks' bytes."""
    rooms = torch.zeros(ranks.count, dtype=torch.float64)
    rooms[ranks.rank] = max(mine, 0)
    return int(ranks.sum(rooms).min())


def checked(recipe: Recipe, choice: MicroBatch) -> Recipe:
    """The recipe with the choice as its accumulation; RecipeError where another key excludes that."""
    chosen = with_passes_of(choice.images, recipe, choice.ranks)
    try:
        check(chosen, choice.ranks)
    except RecipeError as error:
        place = f'optim.micro_batch = "auto": by the memory there is, {choice.images} images a pass'
        raise error.at(place) from None
    return chosen


def estimate(recipe: Recipe, choice: MicroBatch, bf16: bool) -> tuple[int, int]:
    """(Weights with their state, activations) in bytes, by `cost.memory_bytes`."""
    return cost.memory_bytes(with_passes_of(choice.images, recipe, choice.ranks), choice.ranks, bf16)


def splits_badly(recipe: Recipe, choice: MicroBatch, bf16: bool, room: int) -> str:
    """What the log adds where far more images would fit than in a pass that divides a rank's share; else ""."""

    def taken(images: int) -> int:
        whole = replace(recipe.optim, batch_size=images * choice.ranks, accumulation=1, micro_batch=0)
        return sum(cost.memory_bytes(replace(recipe, optim=whole), choice.ranks, bf16))

    share = recipe.optim.batch_size // choice.ranks
    sizes = range(choice.images + 1, share + 1)
    fit = choice.images + bisect_right(sizes, cost.MEMORY_SHARE * room, key=taken)
    if fit <= WASTEFUL * choice.images:
        return ""
    return f"; {fit} would fit, but a pass must divide the {share} images of a rank"


def halved(recipe: Recipe, choice: MicroBatch | None) -> tuple[Recipe, MicroBatch] | None:
    """The next smaller choice after a pass was too large, once; None where the size was not chosen or can't change.

    Several ranks can't agree in the middle of a step.
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


def recorded(recipe: Recipe, ranks: int) -> MicroBatch | None:
    """The choice in the newest checkpoint; None unless it was made for as many ranks and still divides their share."""
    from st_fast.train import choices  # loads the kernels, and may compile csrc first: no part of a dry run

    meta = choices.newest_meta(recipe)
    choice = meta.micro_batch if meta else None
    if choice is None or choice.ranks != ranks or choice.images not in possible_passes(recipe.optim, ranks):
        return None
    return choice
