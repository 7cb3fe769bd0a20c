"""Tries every kernel once before a stage trains: what does not build or run here is replaced by the reference.

At this point no weight has changed, so nothing is half made; all ranks replace the same ops.
"""

import functools
from collections.abc import Callable, Mapping

import torch

from st_fast import kernels
from st_fast.core.machine import lacks_memory
from st_fast.core.ranks import Ranks
from st_fast.kernels.common.trial import Draw, Size
from st_fast.recipe.schema import Model


def validated_kernels(
    choices: Mapping[str, str], model: Model, ranks: Ranks, dtype: torch.dtype, say: Callable[[str], None]
) -> kernels.KernelTable:
    """The chosen kernels for this device, less those that fail a smoke test here: each of these is told to `say`."""
    table = kernels.select({name: choice for name, choice in choices.items() if name != "adamw_ema"}, ranks.device)
    draw, size = Draw(ranks.device, dtype, seed=0), Size(2, model.tokens, model.width, model.heads)

    def check(name: str) -> None:
        op = kernels.declared(name)
        for make in op.trials():
            trial = make(draw, size)
            trial.backward(getattr(table, name)(*trial.args))

    works = smoke_test({name: functools.partial(check, name) for name in kernels.TABLE}, ranks, say)
    used = {name: getattr(table, name) if works[name] else kernels.declared(name).definition for name in kernels.TABLE}
    return kernels.KernelTable(**used, bias_gradients=table.bias_gradients)


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
