"""The compiled ops of this build: `_ops` imports them where the build has them."""

from __future__ import annotations

import ctypes
from pathlib import Path

from . import _ops


def path(kind: str = "cpu") -> Path | None:
    """The file of the compiled CPU ops; None in a build of Python files only, and for every other kind."""
    module = getattr(_ops, _ops.add_op_namespace_prefix("").partition(":")[0], None)
    return Path(module.__file__) if module is not None and kind == "cpu" else None


def available(kind: str = "cpu") -> bool:
    """Whether the compiled ops of this kind are loaded."""
    return path(kind) is not None


def load() -> bool:
    """They came with `_ops`."""
    return available()


def isa() -> str | None:
    """The instruction set that they use, "avx512", "avx2" or "baseline"; None without them."""
    file = path()
    if file is None:
        return None
    name = ctypes.CDLL(str(file)).st_fast_isa
    name.restype = ctypes.c_char_p
    found = name()
    return found.decode() if found else None
