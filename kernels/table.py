"""One callable per op for a device: the choice, per op, between the fused ops and the reference."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import native, ops, reference
from .defaults import DEFAULTS, OPS

CHOICES = ("auto", "fused", "reference")


@dataclass(frozen=True)
class KernelTable:
    """One callable per op that the model and the losses use, with the signatures of `reference.py`."""

    norm_modulate: Callable[..., Any]
    gate_residual_norm_modulate: Callable[..., Any]
    gate_residual: Callable[..., Any]
    align: Callable[..., Any]
    guided_feature_loss: Callable[..., Any]
    cfg_extrapolate: Callable[..., Any]
    qk_norm: Callable[..., Any]
    linear: Callable[..., Any]
    gelu_tanh: Callable[..., Any]


def _check(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what} {value!r} is unknown; allowed: {', '.join(allowed)}{hint}")


def auto(op: str, device: torch.device) -> str:
    """What was measured faster on such a device; the reference where csrc is missing or nothing was measured."""
    if device.type == "cpu" and not native.available():
        return "reference"
    return DEFAULTS.get(device.type, {}).get(op, "reference")


def select(choices: Mapping[str, str], device: torch.device) -> KernelTable:
    """The table for one device. `choices` maps an op to "fused", "reference" or "auto", which is also the default.

    Raises ValueError for an unknown op or choice, naming it, what is allowed, and the nearest name.
    """
    for op, choice in choices.items():
        _check("kernels: op", op, OPS)
        _check(f"kernels.{op}:", choice, CHOICES)
    table: dict[str, Callable[..., Any]] = {}
    for op in OPS:
        choice = choices.get(op, "auto")
        choice = auto(op, device) if choice == "auto" else choice
        table[op] = getattr(ops if choice == "fused" else reference, op)
    return KernelTable(**table)
