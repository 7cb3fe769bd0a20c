"""One callable per op for a device: the choice, per op, between the fused ops and the reference."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, make_dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import FORMS, TABLE, declared, native
from .common.registry import has_kernel

CHOICES = ("auto", "fused", "reference")

SLOWER: dict[str, tuple[str, ...]] = {"cuda": (), "cpu": ()}
"""Ops whose kernel the whole step measured slower than plain PyTorch, by kind of device: "auto" takes the reference."""

BIASES = "bias_gradients"
FOR_BIASES: dict[str, tuple[str, ...]] = {"cuda": ("gelu_tanh", "swiglu"), "cpu": ()}
"""Ops that on such a device "auto" takes for the bias gradients that they sum, and for nothing else."""

if TYPE_CHECKING:

    class KernelTable:
        """One callable per op, with the signatures of `reference.py`; and whether ops sum the biases' gradients."""

        bias_gradients: bool

        def __init__(self, *, bias_gradients: bool = False, **ops: Callable[..., Any]) -> None: ...

        def __getattr__(self, op: str) -> Callable[..., Any]: ...

        def fuses(self, op: str) -> bool: ...

else:

    def fuses(self: Any, op: str) -> bool:
        """Whether the op is more than its definition."""
        return getattr(self, op) is not declared(op).definition

    FIELDS = [*((op, Callable[..., Any]) for op in TABLE), (BIASES, bool, field(default=False))]
    KernelTable = make_dataclass("KernelTable", FIELDS, frozen=True, namespace={"fuses": fuses})
    KernelTable.__module__ = __name__
    KernelTable.__doc__ = (
        "One callable per op that the model and the losses use, with the signatures of `reference.py`; and whether the "
        "ops after linear layers sum the gradients of their biases."
    )


def _check(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what} {value!r} is unknown; allowed: {', '.join(allowed)}{hint}")


def auto(switch: str, device: torch.device, choices: Mapping[str, str] | None = None) -> str:
    """What is faster on such a device: the fused op where it has a kernel there, unless that was measured slower, or
    serves the bias gradients alone and they are not among the other `choices`.

    Without csrc a CPU takes the reference for all ops: only with it were they measured. An op that stands
    `instead` of others is the reference: which is faster depends on the shapes, and the caller's trial says so.
    """
    if switch == BIASES:
        return "fused" if device.type == "cuda" else "reference"
    if declared(switch).instead is not None or (device.type == "cpu" and not native.available()):
        return "reference"
    slower = switch in SLOWER.get(device.type, ())
    if switch in FOR_BIASES.get(device.type, ()):
        slower |= chosen(BIASES, device, choices or {}) == "reference"
    return "fused" if has_kernel(switch, device.type) and not slower else "reference"


def chosen(switch: str, device: torch.device, choices: Mapping[str, str]) -> str:
    """ "fused" or "reference": what `choices` have for it, or what "auto" stands for."""
    choice = choices.get(switch, "auto")
    return auto(switch, device, choices) if choice == "auto" else choice


def select(choices: Mapping[str, str], device: torch.device) -> KernelTable:
    """The table for one device. `choices` maps an op, or "bias_gradients", to "fused", "reference", a form of the op's
    (FORMS), or "auto", which is also the default.

    Raises ValueError for an unknown op or choice, naming it, what is allowed, and the nearest name.
    """
    for switch, choice in choices.items():
        _check("kernels: op", switch, (*TABLE, BIASES))
        _check(f"kernels.{switch}:", choice, (*CHOICES, *FORMS.get(switch, ())))
    table: dict[str, Callable[..., Any]] = {}
    for op in TABLE:
        found = declared(op)
        forms = {"fused": found.call, "reference": found.definition, **found.forms}
        table[op] = forms[chosen(op, device, choices)]
    return KernelTable(**table, bias_gradients=chosen(BIASES, device, choices) == "fused")
