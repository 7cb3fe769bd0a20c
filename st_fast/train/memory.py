"""Memory: how much is in use, and what to do where it does not suffice, told in one line."""

from __future__ import annotations

import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import clear_frames

import torch

from st_fast.core.errors import RunFailed
from st_fast.core.machine import PassTooLarge, container_limit, lacks_memory, local_count
from st_fast.core.ranks import Ranks
from st_fast.recipe import cost
from st_fast.recipe.batch import images_a_pass, possible_passes
from st_fast.recipe.schema import Recipe


@contextmanager
def explained(recipe: Recipe, ranks: Ranks, dtype: torch.dtype, given: Recipe | None = None) -> Iterator[None]:
    """Turns a lack of memory inside the block into a RunFailed that says what would fit. Nothing half made is saved.

    `given`: see `advice`.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise RunFailed(advice(recipe, ranks, dtype, capacity(ranks.device), given)) from error


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
    """Bytes that this process may use: of the GPU, what others leave; of the host, its limit or its part of the RAM."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    whole = min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), container_limit()) // local_count()
    return whole if limit == resource.RLIM_INFINITY else min(limit - mapped_code(), whole)


def peak_bytes(device: torch.device) -> int:
    """The most memory in use so far: of the GPU what tensors took since the stage began, of the host the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * (1 if sys.platform == "darwin" else 1024)  # macOS counts bytes


def release(device: torch.device) -> None:
    """Gives up what nothing refers to any more: tensors in cycles, and a GPU's memory that is only kept for later."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def forget_peak(device: torch.device) -> None:
    """Starts `peak_bytes` of a GPU anew; the host's can't be."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def mapped_code() -> int:
    """Bytes of address space that programs and libraries take, which a limit on it counts too."""
    try:
        with open("/proc/self/status") as file:
            sizes = [int(line.split()[1]) for line in file if line.startswith(("VmLib:", "VmExe:"))]
    except OSError:  # not Linux
        return 0
    return sum(sizes) * 1024


def advice(recipe: Recipe, ranks: Ranks, dtype: torch.dtype, room: int, given: Recipe | None = None) -> str:
    """The line: where it happened, what was asked for, and the option with which it should fit.

    `given` is the recipe as it was given, where a choice of this module has become `recipe`.
    """
    optim, bf16 = recipe.optim, dtype == torch.bfloat16
    now = images_a_pass(optim, ranks.count)
    fixed, activations = cost.memory_bytes(recipe, ranks.count, bf16)
    an_image = activations // now
    # That `now` does not fit is known.
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
    if (given or recipe).optim.accumulation == 1:
        option = f"--optim.micro_batch={micro}"
    else:
        option = f"--optim.accumulation={optim.batch_size // (ranks.count * micro)}"
    options = option + " --run.cuda_graphs=false" * recipe.run.cuda_graphs
    return f"{line}: {options} makes it {micro} a pass, with the same mathematics{less}"
