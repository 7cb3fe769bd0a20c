"""Keeps freed memory with the process, so that a training step on the CPU does not fault its tensors in anew each time.

glibc gives large blocks back to the kernel as they are freed; the next step's tensors are then mapped and zeroed page
by page, which on a virtual machine costs more than the ops that fill them.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more; larger blocks stay mappings of their own


def keep_freed_memory() -> bool:
    """Blocks up to 32 MiB come from the heap, and the heap never shrinks. False where there is no glibc.

    For the whole process; peak use stays what it was, but is held until exit.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, -1))
