"""Keeps freed memory with the process, so that a training step on the CPU does not fault its tensors in anew each time.

glibc gives large blocks back to the kernel as they are freed; the next step's tensors are then mapped and zeroed page
by page, which on a virtual machine costs more than the ops that fill them. What is kept is not always used again,
though: a process that grows has to give it back now and then.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more; larger blocks stay mappings of their own
GROWTH = 256 << 20
"""Bytes by which a process may outgrow a step's own tensors before it gives freed memory back."""
STATM = Path("/proc/self/statm")


def keep_freed_memory() -> bool:
    """Blocks up to 32 MiB come from the heap, and the heap never shrinks by itself. False where there is no glibc.

    For the whole process. What is freed is held until `give_back_freed_memory` or the end.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, -1))


def give_back_freed_memory() -> None:
    """Pages of the heap that hold nothing go back to the kernel; nothing is done where there is no glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


class GrowthLimit:
    """Called between steps, gives freed memory back where the process has grown by more than GROWTH.

    A tensor is an aligned block, and glibc (seen with 2.36) does not always put one into the hole that another of its
    size has left. A study's process grew in this way by 1.4 MiB a step, to 4.9 GiB, of which 0.9 were in use.
    """

    def __init__(self) -> None:
        self._working: int | None = None
        give_back_freed_memory()  # of what ran before in this process

    def __call__(self) -> None:
        size = own_bytes()
        if self._working is None:
            self._working = size  # with a step's own tensors, which are faulted in again by the step after
        elif size > self._working + GROWTH:
            give_back_freed_memory()
            self._working = None


def own_bytes() -> int:
    """Memory of this process in RAM, without files and what it shares; 0 where the system doesn't say."""
    try:
        resident, shared = STATM.read_text().split()[1:3]
    except OSError:
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
