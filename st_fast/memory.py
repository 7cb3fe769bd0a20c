"""Memory: how much is in use, and what to do where it does not suffice, told in one line."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from st_fast import flops
from st_fast.errors import RunFailed
from st_fast.parallel import Ranks
from st_fast.recipe.schema import Recipe

MARGIN = 0.9
"""The share of the memory that an estimate may fill: fragments and libraries take the rest."""


@contextmanager
def explained(recipe: Recipe, ranks: Ranks, dtype: torch.dtype) -> Iterator[None]:
    """Turns a lack of memory inside the block into a RunFailed that says what would fit. Nothing half made is saved."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise RunFailed(advice(recipe, ranks, dtype, capacity(ranks.device))) from error


def lacks_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or, where PyTorch has no class for it, on the host."""
    text = str(error)
    # The stable ABI that csrc is built on loses the cause; but making room for a result fails for no other reason.
    lost = "API call failed" in text and any(f"aten::{op}" in text for op in ("empty", "new_empty"))
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text or lost


def capacity(device: torch.device) -> int:
    """Bytes that this process may use: of the GPU, what other processes leave; of the host, its limit or the RAM."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole if limit == resource.RLIM_INFINITY else min(limit - mapped_code(), whole)


def peak_bytes(device: torch.device) -> int:
    """The most memory in use so far: of the GPU what tensors took since the stage began, of the host the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * (1 if sys.platform == "darwin" else 1024)  # macOS counts bytes


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


def advice(recipe: Recipe, ranks: Ranks, dtype: torch.dtype, room: int) -> str:
    """The line: where it happened, what was asked for, and the accumulation with which it should fit."""
    bf16, now = dtype == torch.bfloat16, flops.micro_batch(recipe.optim, ranks.count)
    fixed, activations = flops.memory_bytes(recipe, ranks.count, bf16)
    an_image = activations // now
    fits = min(now - 1, max(0, int((MARGIN * room - fixed) / an_image)))  # that `now` does not fit is known
    splits = range(recipe.optim.accumulation + 1, recipe.optim.batch_size // ranks.count + 1)
    even = [a for a in splits if recipe.optim.batch_size % (ranks.count * a) == 0]
    chosen = next((a for a in even if recipe.optim.batch_size // (ranks.count * a) <= fits), None)
    less = "" if recipe.run.checkpointing == "block" else ", or --run.checkpointing=block, which keeps less an image"
    where = f"{ranks.place.stage} step {ranks.place.step}" if ranks.place.stage else "start"
    line = (
        f"out of memory on {ranks.device} at {where} with {now} images a pass in {room / 2**30:.2f} GiB; by estimate "
        f"{fits} fit (weights and state {fixed / 2**30:.2f} GiB + {an_image / 2**20:.1f} MiB an image)"
    )
    if chosen is None:
        return f"{line}: take more ranks or a smaller model{less}"
    micro = recipe.optim.batch_size // (ranks.count * chosen)
    options = f"--optim.accumulation={chosen}" + " --run.cuda_graphs=false" * recipe.run.cuda_graphs
    return f"{line}: {options} makes it {micro} a pass, with the same mathematics{less}"
