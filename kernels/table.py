"""One callable per op for a device: the choice, per op, between the fused ops and the reference."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import make_dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import TABLE, declared, native
from .common.registry import has_kernel

CHOICES = ("auto", "fused", "reference")

SLOWER: dict[str, tuple[str, ...]] = {"cuda": (), "cpu": ()}
"""Ops whose kernel the whole step measured slower than plain PyTorch, by kind of device: "auto" takes the reference."""

if TYPE_CHECKING:

    class KernelTable:
        """One callable per op, with the signatures of `reference.py`."""

        def __init__(self, **ops: Callable[..., Any]) -> None: ...

        def __getattr__(self, op: str) -> Callable[..., Any]: ...

        def fuses(self, op: str) -> bool: ...

else:

    def fuses(self: Any, op: str) -> bool:
        """Whether the op is more than its definition."""
        return getattr(self, op) is not declared(op).definition

    fields = [(op, Callable[..., Any]) for op in TABLE]
    KernelTable = make_dataclass("KernelTable", fields, frozen=True, namespace={"fuses": fuses})
    KernelTable.__module__ = __name__
    KernelTable.__doc__ = (
        "One callable per op that the model and the losses use, with the signatures of `reference.py`."
    )


def _check(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what} {value!r} is unknown; allowed: {', '.join(allowed)}{hint}")


def auto(op: str, device: torch.device) -> str:
    """What is faster on such a device: the fused op where it has a kernel there, unless that was measured slower.

    Without csrc a CPU takes the reference for all ops: only with it were they measured. An op that is `timed` is the
    reference: which is faster depends on the shapes, and the caller's trial says so.
    """
    if declared(op).timed or (device.type == "cpu" and not native.available()):
        return "reference"
    slower = op in SLOWER.get(device.type, ())
    return "fused" if has_kernel(op, device.type) and not slower else "reference"


def select(choices: Mapping[str, str], device: torch.device) -> KernelTable:
    """The table for one device. `choices` maps an op to "fused", "reference" or "auto", which is also the default.

    Raises ValueError for an unknown op or choice, naming it, what is allowed, and the nearest name.
    """
    for op, choice in choices.items():
        _check("kernels: op", op, TABLE)
        _check(f"kernels.{op}:", choice, CHOICES)
    table: dict[str, Callable[..., Any]] = {}
    for op in TABLE:
        choice = choices.get(op, "auto")
        choice = auto(op, device) if choice == "auto" else choice
        table[op] = declared(op).call if choice == "fused" else declared(op).definition
    return KernelTable(**table)
