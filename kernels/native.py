"""Loads the compiled ops of csrc, which `build.py` finds or compiles; or the files that ST_FAST_CSRC names.

csrc is built on the stable ABI, so one file serves torch ≥ 2.11. Without it the reference serves on the CPU and
Triton on CUDA; one line says so, once. ST_FAST_CSRC= (empty) leaves it out on purpose, without the notice; several
files are separated by a colon. ST_FAST_ISA = avx512 | avx2 | baseline forces an instruction set.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path

import torch

from . import build

log = logging.getLogger("st_fast")

_loaded: dict[str, Path] = {}


def _file(kind: str) -> Path | None:
    """The named file of this kind if files are named, else the one that fits the sources. Raises build.BuildError."""
    named = os.environ.get("ST_FAST_CSRC")
    if named is None:
        return build.ensure(kind)
    return next((Path(name) for name in named.split(os.pathsep) if f"_csrc_{kind}" in name), None)


def _load(kind: str) -> str | None:
    """Load one kind, once; returns why it is not loaded."""
    if kind in _loaded:
        return None
    try:
        file = _file(kind)
        if file is None:
            return "left out by ST_FAST_CSRC"
        torch.ops.load_library(str(file))
    except build.BuildError as error:
        return str(error)
    except OSError as error:  # torch only says that it could not, its cause says why
        return str(error.__cause__ or error).splitlines()[0]
    _loaded[kind] = file
    return None


@cache
def load() -> None:
    """Load what there is, once; says in one line each why a part for this machine is missing.

    The CUDA part is for machines with a CUDA device.
    """
    told = os.environ.get("ST_FAST_CSRC") != ""
    reason = _load("cpu")
    if reason and told:
        log.warning("st_fast: compiled CPU ops not in use, %s; the reference takes over.", reason)
    reason = _load("cuda") if torch.version.cuda and torch.cuda.is_available() else None
    if reason and told:
        log.warning("st_fast: compiled CUDA ops not in use, %s; Triton and PyTorch take over.", reason)


def available(kind: str = "cpu") -> bool:
    """Whether the compiled ops of this kind ("cpu", "cuda") are loaded."""
    load()
    return kind in _loaded


def path(kind: str = "cpu") -> Path | None:
    """The file they were loaded from."""
    load()
    return _loaded.get(kind)


def cublaslt_lacks() -> str | None:
    """The first name of cuBLASLt that the CUDA part wants and this process does not have; None: it has all."""
    found = path("cuda")
    if found is None:
        return "the caller"
    lacks = ctypes.CDLL(str(found)).st_fast_cublaslt_lacks
    lacks.restype = ctypes.c_char_p
    name: bytes | None = lacks()
    return None if name is None else name.decode()


def isa() -> str | None:
    """The instruction set that the CPU's part uses: avx512, avx2 or baseline; None where it is not loaded.

    Raises ValueError where ST_FAST_ISA names one that this machine lacks.
    """
    file = path()
    if file is None:
        return None
    name = ctypes.CDLL(str(file)).st_fast_isa
    name.restype = ctypes.c_char_p
    found: bytes | None = name()
    if found is None:
        raise ValueError(f"ST_FAST_ISA = {os.environ.get('ST_FAST_ISA')!r}: not an instruction set of this machine")
    return found.decode()
