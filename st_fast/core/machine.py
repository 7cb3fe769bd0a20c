"""The process's limits on this machine (processors, memory, open files) and its rank there, as torchrun gives it.

Importing it imports no torch: recipes are checked without, and threads are chosen before torch loads OpenMP.
"""

from __future__ import annotations

import errno
import gc
import math
import os
import platform
import re
import resource
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from st_fast.core.errors import RunFailed, UserError

if TYPE_CHECKING:
    import torch

SPARE_FILES = 256
"""File descriptors left to the rest of the process."""
ROOT = Path("/")
CGROUP_MOUNTS = (
    "sys/fs/cgroup", "sys/fs/cgroup/unified", "sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct",
)  # fmt: skip
"""Of cgroup v2, alone and beside v1; of v1's cpu controller, under both of its usual names."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""By which a user says how many threads torch computes on."""


MOST_RANKS = 2**20
"""More processes than any job has."""


def rank_count() -> int:
    """Number of ranks that torchrun started; 1 without torchrun. UserError, here and below, for what can't be that."""
    return _given("WORLD_SIZE", 1, MOST_RANKS, 1)


def rank() -> int:
    """This process's number among them."""
    count = rank_count()
    return _given("RANK", 0, count - 1, 0 if count == 1 else None)


def local_count() -> int:
    """Number of ranks on this machine; 1 where what torchrun sets for it is no such number (`meeting_point` asks)."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(text)) if text.isascii() and text.isdecimal() and len(text) < 8 else 1


def local_rank() -> int:
    """This process's number on its machine, which is its GPU's."""
    count = rank_count()
    most = _given("LOCAL_WORLD_SIZE", 1, count, count) - 1
    return _given("LOCAL_RANK", 0, most, 0 if count == 1 else None)


def meeting_point() -> tuple[str, int]:
    """Host and port at which the ranks of a job find one another; checks all that torchrun sets."""
    count, _, _ = rank_count(), rank(), local_rank()
    host = os.environ.get("MASTER_ADDR", "")
    if not host.strip() or not host.isprintable() or len(host) > 255 or not host.isascii():
        raise _refused("MASTER_ADDR", "the host of rank 0", count)
    return host, _given("MASTER_PORT", 1, 65_535, None)


def _given(name: str, low: int, high: int, otherwise: int | None) -> int:
    """A whole number of torchrun's environment; `otherwise` where it is not set, None: it must be."""
    text = os.environ.get(name)
    if text is None and otherwise is not None:
        return otherwise
    if text is None or not (text.isascii() and text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
        raise _refused(name, f"a whole number from {low} to {high}", 1 if name == "WORLD_SIZE" else rank_count())
    return int(text)


def _refused(name: str, allowed: str, count: int) -> UserError:
    text = os.environ.get(name)
    found = "is not set" if text is None else f"= {text[:60]!a}"
    beside = f" beside WORLD_SIZE = {count}" if count > 1 else ""
    return UserError(
        f"environment: {name} {found}{beside}; allowed: {allowed}. torchrun sets it; without torchrun, unset "
        "WORLD_SIZE and RANK"
    )


def usable_cpus() -> int:
    """Number of processors that this process may use: its affinity, or its cgroup's CPU quota, rounded up."""
    return max(1, math.ceil(min(len(affinity()), cpu_quota())))


def physical_cores(system: Path = ROOT) -> int:
    """Number of cores that this process may run on; hardware threads of one core count once, as in torch's default."""
    siblings = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return len({_read(system / siblings.format(number)) or number for number in affinity()})


def usable_threads(system: Path = ROOT) -> int:
    """Number of threads that a rank should compute on: its part of the cores, or of the quota where that is less."""
    return max(1, math.ceil(min(physical_cores(system), cpu_quota(system))) // local_count())


def cpu_name(system: Path = ROOT) -> str:
    """The processor's own name, where the system tells it."""
    found = re.search(r"model name\s*: (.*)", _read(system / "proc/cpuinfo"))
    return (found[1].strip() if found else platform.processor()) or platform.machine()


def affinity() -> set[int]:
    """The processors that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def cpu_quota(system: Path = ROOT) -> float:
    """Processors' time that this process's cgroup and those above it allow, in processors; infinite without a limit.

    Reads cgroup v2's cpu.max and v1's cpu.cfs_quota_us. In a container the listed path may be the host's: then the
    limit is found at the mount's root.
    """
    least = math.inf
    for line in _read(system / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in CGROUP_MOUNTS:
            group = system / mount / path.lstrip("/")
            for folder in (group, *group.parents):
                if not folder.is_relative_to(system / mount):
                    break
                least = min(least, _quota(folder))
    return least


def _quota(folder: Path) -> float:
    """One cgroup's own limit."""
    text = _read(folder / "cpu.max") or f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
    try:
        quota, period = map(int, text.split())
        return quota / period if quota > 0 and period > 0 else math.inf
    except (ValueError, OverflowError):  # "max", or no such file
        return math.inf


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except (OSError, ValueError):  # not there, or a path with a null byte
        return ""


def choose_threads(environ: MutableMapping[str, str] = os.environ, system: Path = ROOT) -> None:
    """Sets OMP_NUM_THREADS where a quota or other ranks leave less than a core for each of torch's threads.

    torch reads it when it loads; if it is loaded, nothing is done. The user's own number stays; torchrun's, which is 1
    for each of several ranks, can't be told from it.
    """
    if "torch" in sys.modules or any(key in environ for key in THREADS):
        return
    if local_count() == 1 and cpu_quota(system) == math.inf:  # as everywhere: not worth looking for cores
        return
    if (threads := usable_threads(system)) < physical_cores(system):
        environ[THREADS[0]] = str(threads)


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
    """Raises this process's limit on open files if `count` of data need it; UserError where the system forbids that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    mine = Path("/proc/self/fd")
    need = count + SPARE_FILES + (len(os.listdir(mine)) if mine.is_dir() else 0)
    if soft != resource.RLIM_INFINITY and soft < need:
        if hard != resource.RLIM_INFINITY and hard < need:
            fewer = ", or have the data in fewer, larger files" if count > SPARE_FILES else ""
            raise UserError(
                f"{count} data file{'s' * (count != 1)} and what a process opens beside them need a limit of {need} "
                f"open files; here it is {hard} and can't be raised by this process: raise it (ulimit -Hn){fewer}"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


NO_MEMORY = (
    "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
)  # fmt: skip
"""In errors of PyTorch that have no class of their own."""


class PassTooLarge(RuntimeError):
    """Memory lacked in a forward or backward pass: weights and their state are those of the last complete step."""


def lacks_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or, where PyTorch has no class for it, on the host."""
    text, torch = str(error), sys.modules.get("torch")
    # The stable ABI that csrc is built on loses the cause; but making room for a result fails for no other reason.
    lost = "API call failed" in text and any(f"aten::{op}" in text for op in ("empty", "new_empty"))
    known = isinstance(error, (MemoryError, PassTooLarge)) or getattr(error, "errno", None) == errno.ENOMEM
    known = known or (torch is not None and isinstance(error, torch.OutOfMemoryError))
    return known or lost or any(words in text for words in NO_MEMORY)


def out_of_memory(error: BaseException, doing: str) -> str:
    """One line on an error that `lacks_memory`: where it ran out, while `doing` what, and what was asked for."""
    text = str(error)
    gpu, asked = re.search(r"GPU (\d+)", text), re.search(r"allocate ([\d.]+ ?(?:[KMGT]i?B|bytes))", text)
    on_device = any(word in text for word in ("CUDA", "CUBLAS", "CUDNN"))
    where = "" if "API call failed" in text else " on the host"  # what csrc's error says nothing of
    if on_device:
        where = f" on cuda:{gpu[1]}" if gpu else " on the GPU"
    return f"out of memory{where} while {doing}" + (f" ({asked[1]} were asked for)" if asked else "")


@contextmanager
def naming_lack_of_memory(doing: str) -> Iterator[None]:
    """Turns a lack of memory inside the block into a RunFailed that says where it ran out and while `doing` what."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not lacks_memory(error):
            raise
        raise RunFailed(out_of_memory(error, doing)) from error


_frozen = False


def freeze_heap() -> None:
    """Takes all objects of now out of the garbage collector's passes, unless the program around has done so itself."""
    global _frozen
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()
        _frozen = True


def thaw_heap() -> None:
    """Gives the collector back what `freeze_heap` took from it."""
    global _frozen
    if _frozen:
        gc.unfreeze()
        _frozen = False
