"""Checks that compare numbers, kept out of the way of a rehearsal: kernels that do nothing compute nothing right.

`disarm` patches each module below as soon as it is imported, in this process; `rehearse` has it done in every child,
too. A name that is gone is an error that says where to look: a gate must not come back to life unseen, and none may
be left here for nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any


class GateGone(Exception):
    """A name that is patched here is not in its module any more."""


def _put(module: Any, name: str, value: object) -> None:
    if not hasattr(module, name):
        where = getattr(module, "__name__", module)
        raise GateGone(f"{where} has no {name!r}, which tests/stand_in/gates.py patches: name its successor there")
    setattr(module, name, value)


def _nothing(*args: object, **options: object) -> None:
    return None


def _gate(module: ModuleType) -> None:
    """Results against float64, and losses of two loops against one another: all are zero here."""
    _put(module, "check", _nothing)
    _put(module, "errors", lambda *args: (0.0, 0.0))
    _put(module, "worst_difference", lambda *args: 0.0)
    _put(module, "by_kernel", lambda *args, **options: {"gemm": 1e-3})  # CUPTI finds no device behind the stand-in


def _optimiser(module: ModuleType) -> None:
    """A few steps against the reference."""
    _put(module, "check", _nothing)


def _attention(module: ModuleType) -> None:
    """Backends against float64. cuDNN needs a device: attention by torch's own kernel stands for it."""
    _put(module, "verify", _nothing)
    able = module.BACKENDS["efficient"]
    module.BACKENDS["cudnn"] = replace(module.BACKENDS["cudnn"], attend=able.attend, missing=able.missing)


def _timed(module: ModuleType) -> None:
    """Two ways of an op against float32, and one of them against itself."""
    _put(module, "wrong", _nothing)


def _torch(module: ModuleType) -> None:
    """cuDNN; what tests ask of numbers; and the kernel that waits, which nothing would wait for."""
    module.backends.cudnn.enabled = False
    module.backends.cuda.enable_cudnn_sdp(False)
    _put(module.cuda, "_sleep", _nothing)
    _put(module.Tensor, "isfinite", lambda x: module.ones(x.shape, dtype=module.bool))  # as only tests write it


def _testing(module: ModuleType) -> None:
    _put(module, "assert_close", _nothing)


GATES: dict[str, Callable[[Any], None]] = {
    "bench.measure": _gate,
    "bench.optimiser": _optimiser,
    "st_fast.model.attention": _attention,
    "st_fast.model.timed": _timed,
    "torch": _torch,
    "torch.testing": _testing,
}


class _Loader(importlib.abc.Loader):
    """Loads as another does, then patches."""

    def __init__(self, inner: Any, patch: Callable[[Any], None]) -> None:
        self._inner, self._patch = inner, patch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._inner.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        self._patch(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in GATES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, GATES[name])
        return spec


def disarm() -> None:
    """Patches what is imported, and what will be. Raises GateGone, then or at that import."""
    for name, patch in GATES.items():
        if name in sys.modules:
            patch(sys.modules[name])
    sys.meta_path.insert(0, _Finder())
