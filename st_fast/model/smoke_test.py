"""Tries every kernel once before a stage trains: what does not build or run here is replaced by the reference.

At this point no weight has changed, so nothing is half made; all ranks replace the same ops.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from st_fast import kernels
from st_fast.core.machine import lacks_memory
from st_fast.core.ranks import Ranks
from st_fast.recipe.schema import Model


def validated_kernels(
    choices: Mapping[str, str], model: Model, ranks: Ranks, dtype: torch.dtype, say: Callable[[str], None]
) -> kernels.KernelTable:
    """The chosen kernels for this device, less those that fail a smoke test here: each of these is told to `say`."""
    table = kernels.select({name: choice for name, choice in choices.items() if name != "adamw_ema"}, ranks.device)
    inputs = trial_inputs(model, ranks.device, dtype)
    names = [f.name for f in fields(table)]
    checks = {name: functools.partial(_forward_and_backward, getattr(table, name), inputs[name]) for name in names}
    works = smoke_test(checks, ranks, say)
    return replace(table, **{name: getattr(kernels.reference, name) for name in names if not works[name]})


def smoke_test(checks: Mapping[str, Callable[[], None]], ranks: Ranks, say: Callable[[str], None]) -> dict[str, bool]:
    """Runs each check once; whether it passed on every rank. What fails is told to `say` with the reason."""
    reasons = [_failure(check, ranks.device) for check in checks.values()]
    failed = ranks.any([reason is not None for reason in reasons])
    for name, bad, reason in zip(checks, failed, reasons, strict=True):
        if bad:
            say(f"kernels: {name} does not work here ({reason or 'on another rank'}); the reference takes over")
    return dict(zip(checks, (not bad for bad in failed), strict=True))


def _failure(check: Callable[[], None], device: torch.device) -> str | None:
    try:
        check()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # a compiler may raise anything
        if lacks_memory(error):
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return None


def trial_inputs(model: Model, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    """Small inputs with the model's token count and widths, for one forward and backward of each op."""

    def new(*shape: int) -> Tensor:
        return torch.full(shape, 0.5, device=device, dtype=dtype, requires_grad=True)

    x, row, head = (2, model.tokens, model.width), (2, model.width), model.width // model.heads
    packed, weight = (2, model.tokens, 3, model.heads, head), torch.ones(2, device=device)
    return {
        "norm_modulate": lambda: (new(*x), new(*row), new(*row), 1e-6),
        "gate_residual_norm_modulate": lambda: (new(*x), new(*x), new(*row), new(*row), new(*row), 1e-6),
        "gate_residual": lambda: (new(*x), new(*x), new(*row)),
        "align": lambda: (new(*x), new(*x).detach(), weight),
        "guided_feature_loss": lambda: (new(*x), new(*x).detach(), new(*x).detach(), weight, 3.0, "mse"),
        "cfg_extrapolate": lambda: (new(*x).detach(), new(*x).detach(), 3.0),
        "qk_norm": lambda: (new(*packed), *(new(head) for _ in range(4)), 1e-6),
        "linear": lambda: (new(*x), new(model.width, model.width), new(model.width)),
        "gelu_tanh": lambda: (new(*x),),
    }


def _forward_and_backward(op: Callable[..., Any], inputs: Callable[[], tuple[Any, ...]]) -> None:
    result = op(*inputs())
    sums = [out.float().sum() for out in (result if isinstance(result, tuple) else (result,)) if out.requires_grad]
    if sums:
        torch.stack(sums).sum().backward()
