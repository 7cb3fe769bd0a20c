"""The process's limits on this machine (processors, memory, open files) and its rank there, as torchrun gives it.

Importing it imports no torch: recipes are checked without.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

from st_fast.core.errors import UserError

if TYPE_CHECKING:
    import torch

SPARE_FILES = 256
"""File descriptors left to the rest of the process."""


def rank_count() -> int:
    """Number of ranks that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_count() -> int:
    """Number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine, which is its GPU's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def usable_cpus() -> int:
    """Number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(device: torch.device) -> int:
    """Bytes free on the device; on the host, this rank's part of what is available."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except OSError:  # not Linux: all of it is the best that can be known
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(free, container_limit()) // local_count()


def container_limit(path: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Bytes that a container may use; more than any machine has where there is no limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return 2**63


def allow_open_files(count: int) -> None:
    """Raises this process's limit on open files if `count` more need it; one line where the system forbids that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    mine = Path("/proc/self/fd")
    need = count + SPARE_FILES + (len(os.listdir(mine)) if mine.is_dir() else 0)
    if soft != resource.RLIM_INFINITY and soft < need:
        if hard != resource.RLIM_INFINITY and hard < need:
            raise UserError(f"{count} files would be open at once, at most {hard} may be; make fewer, larger ones")
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


class PassTooLarge(RuntimeError):
    """Memory lacked in a forward or backward pass: weights and their state are those of the last complete step."""


def lacks_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or, where PyTorch has no class for it, on the host."""
    import torch

    text = str(error)
    # The stable ABI that csrc is built on loses the cause; but making room for a result fails for no other reason.
    lost = "API call failed" in text and any(f"aten::{op}" in text for op in ("empty", "new_empty"))
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError, PassTooLarge))
    return known or "can't allocate memory" in text or lost
