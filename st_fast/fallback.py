"""Tries every kernel once before a stage trains: what does not build or run here is replaced by the reference.

At this point no weight has changed, so nothing is half made; all ranks replace the same ops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from st_fast import flops, kernels, updates
from st_fast.memory import lacks_memory
from st_fast.optim import NormOp, UpdateOp
from st_fast.parallel import Ranks
from st_fast.recipe.schema import Model, Recipe

Op = Callable[..., Any]


@dataclass(frozen=True)
class SoundOps:
    """The ops that a stage uses, each of which has worked here once."""

    table: kernels.KernelTable
    update: UpdateOp
    norm: NormOp


def sound_ops(recipe: Recipe, ranks: Ranks, dtype: torch.dtype, say: Callable[[str], None]) -> SoundOps:
    """The recipe's choice of kernels for this device, less those that fail: each of these is told to `say`."""
    choices = {name: choice for name, choice in vars(recipe.kernels).items() if name != "adamw_ema"}
    table = kernels.select(choices, ranks.device)
    names = [f.name for f in fields(table)]
    trial = Trial(recipe.model, ranks.device, dtype)
    reasons = [trial.failure(name, getattr(table, name)) for name in names]
    chosen = updates.choose(recipe.optim.implementation, ranks.device)
    reasons.append(trial.optimiser_failure(chosen.update, chosen.norm))
    failed = ranks.any([reason is not None for reason in reasons])
    ours = recipe.optim.implementation in ("auto", "st_fast")
    step = "adamw_ema" if ours else f"optim.implementation {recipe.optim.implementation}"
    for name, bad, reason in zip([*names, step], failed, reasons, strict=True):
        if bad:
            say(f"kernels: {name} does not work here ({reason or 'on another rank'}); the reference takes over")
    table = replace(table, **{n: getattr(kernels.reference, n) for n, bad in zip(names, failed, strict=False) if bad})
    if failed[-1] or (ours and recipe.kernels.adamw_ema == "reference"):
        return SoundOps(table, kernels.reference.adamw_ema_, kernels.reference.grad_norm)
    return SoundOps(table, chosen.update, chosen.norm)


class Trial:
    """Small inputs with the model's token count and widths, for one forward and backward of each op."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device, self.dtype = model, device, dtype

    def _tensor(self, *shape: int) -> Tensor:
        return torch.full(shape, 0.5, device=self.device, dtype=self.dtype, requires_grad=True)

    def _arguments(self, name: str) -> tuple[Any, ...]:
        model, tensor, tokens = self.model, self._tensor, flops.tokens(self.model)
        x, row = (2, tokens, model.width), (2, model.width)
        weight, head = torch.ones(2, device=self.device), model.width // model.heads
        packed = (2, tokens, 3, model.heads, head)
        return {
            "norm_modulate": lambda: (tensor(*x), tensor(*row), tensor(*row), 1e-6),
            "gate_residual_norm_modulate": lambda: (
                tensor(*x), tensor(*x), tensor(*row), tensor(*row), tensor(*row), 1e-6,
            ),
            "gate_residual": lambda: (tensor(*x), tensor(*x), tensor(*row)),
            "align": lambda: (tensor(*x), tensor(*x).detach(), weight),
            "guided_feature_loss": lambda: (
                tensor(*x), tensor(*x).detach(), tensor(*x).detach(), weight, 3.0, "mse",
            ),
            "cfg_extrapolate": lambda: (tensor(*x).detach(), tensor(*x).detach(), 3.0),
            "qk_norm": lambda: (tensor(*packed), *(tensor(head) for _ in range(4)), 1e-6),
            "linear": lambda: (tensor(*x), tensor(model.width, model.width), tensor(model.width)),
            "gelu_tanh": lambda: (tensor(*x),),
        }[name]()  # fmt: skip

    def failure(self, name: str, op: Op) -> str | None:
        """Why the op does not work here, forward and backward; None if it does."""
        return self._failure(lambda: _forward_and_backward(op, self._arguments(name)))

    def optimiser_failure(self, update: UpdateOp, norm: NormOp) -> str | None:
        """The same for the optimiser's two ops."""

        def run() -> None:
            low = self.dtype != torch.float32
            size, scalar = (self.model.width,), torch.ones((), device=self.device)
            gradient = torch.ones(size, device=self.device, dtype=self.dtype)
            master, first, second, ema = (torch.ones(size, device=self.device) for _ in range(4))
            copies = [gradient.clone()] if low else []
            update(
                [master], [gradient], [first], [second], [ema], copies, scalar.clone(), norm([gradient]), scalar,
                beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, ema_decay=0.9, max_norm=1.0,
            )  # fmt: skip

        return self._failure(run)

    def _failure(self, run: Callable[[], None]) -> str | None:
        try:
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except Exception as error:  # a compiler may raise anything
            if lacks_memory(error):
                raise
            return f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return None


def _forward_and_backward(op: Op, arguments: tuple[Any, ...]) -> None:
    result = op(*arguments)
    sums = [out.float().sum() for out in (result if isinstance(result, tuple) else (result,)) if out.requires_grad]
    if sums:
        torch.stack(sums).sum().backward()
