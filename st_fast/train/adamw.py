"""AdamW implementations: st_fast's, torch's and apex's, on the same state and with the same result.

Masters, moments, EMA and the number of updates are the same tensors for all of them, so a checkpoint of one can be
resumed with another. None waits for the device: a gradient norm that is not finite leaves everything as it was.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from st_fast import kernels
from st_fast.core.errors import UserError
from st_fast.core.ranks import Ranks
from st_fast.model.smoke_test import smoke_test
from st_fast.recipe.schema import Recipe

UpdateOp = Callable[..., None]
NormOp = Callable[[list[Tensor]], Tensor]

APEX_OPS = ("multi_tensor_adam_capturable", "multi_tensor_adam_capturable_master")
APEX_CHUNK = 2048 * 32
"""Elements of a thread block, as in apex's own optimiser."""
ADAMW_MODE, BIAS_CORRECTION = 1, 1


@dataclass(frozen=True)
class Implementation:
    """An AdamW step and the gradient norm that goes with it."""

    update: UpdateOp
    """Has the signature of `st_fast.kernels.adamw_ema_`."""
    norm: NormOp
    refusal: Callable[[torch.device], str | None] = lambda device: None
    """Why it can't run on a device; None if it can."""


def choose(name: str, device: torch.device) -> Implementation:
    """`optim.implementation` on a device; "auto" is st_fast's. UserError, in one line, where it can't run."""
    chosen = IMPLEMENTATIONS["st_fast" if name == "auto" else name]
    problem = chosen.refusal(device)
    if problem is not None:
        able = ", ".join(other for other, one in IMPLEMENTATIONS.items() if one.refusal(device) is None)
        raise UserError(f"optim.implementation = {name!r}: {problem}; available here: {able}")
    return chosen


def validated(recipe: Recipe, ranks: Ranks, dtype: torch.dtype, say: Callable[[str], None]) -> tuple[UpdateOp, NormOp]:
    """The recipe's optimiser step and gradient norm, or the reference where they fail a smoke test on any rank."""
    chosen = choose(recipe.optim.implementation, ranks.device)
    ours = recipe.optim.implementation in ("auto", "st_fast")
    name = "adamw_ema" if ours else f"optim.implementation {recipe.optim.implementation}"

    def one_step() -> None:
        one, scalar = torch.ones(recipe.model.width, device=ranks.device), torch.ones((), device=ranks.device)
        gradient = one.to(dtype)
        copies = [] if dtype == torch.float32 else [gradient.clone()]
        chosen.update(
            [one.clone()], [gradient], [one.clone()], [one.clone()], [one], copies, scalar.clone(),
            chosen.norm([gradient]), scalar,
            beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, ema_decay=0.9, max_norm=1.0,
        )  # fmt: skip

    works = smoke_test({name: one_step}, ranks, say)[name]
    if not works or (ours and recipe.kernels.adamw_ema == "reference"):
        return kernels.reference.adamw_ema_, kernels.reference.grad_norm
    return chosen.update, chosen.norm


def torch_norm(grads: list[Tensor]) -> Tensor:
    """√ Σ g² over all tensors as `clip_grad_norm_` computes it: the norm of each tensor's norm; 0-dim float32."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)))


def torch_update(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor], copies: Sequence[Tensor], step: Tensor, grad_norm: Tensor, lr: Tensor,
    beta1: float, beta2: float, eps: float, weight_decay: float, ema_decay: float, max_norm: float,
    ema_warmup: bool = False,
) -> None:  # fmt: skip
    """The function of `torch.optim.AdamW(fused=True)`. Clipping is passed as the scale that it divides gradients by."""
    steps = list(step.expand(len(params)).clone().unbind())  # torch counts the steps of each tensor
    skipped = (~torch.isfinite(grad_norm)).float()
    adamw(
        list(params), [g.to(p.dtype) for g, p in zip(grads, params, strict=True)], list(exp_avgs), list(exp_avg_sqs),
        [], steps, fused=True, grad_scale=clip_factor(grad_norm, max_norm).reciprocal(), found_inf=skipped,
        amsgrad=False, beta1=beta1, beta2=beta2, lr=lr, weight_decay=weight_decay, eps=eps, maximize=False,
    )  # fmt: skip
    step.copy_(steps[0])
    update_emas(params, emas, step, grad_norm, ema_decay, ema_warmup)
    if copies:
        torch._foreach_copy_(list(copies), list(params))


def apex_update(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor], copies: Sequence[Tensor], step: Tensor, grad_norm: Tensor, lr: Tensor,
    beta1: float, beta2: float, eps: float, weight_decay: float, ema_decay: float, max_norm: float,
    ema_warmup: bool = False,
) -> None:  # fmt: skip
    """The op of apex's FusedAdam that keeps its scalars on the device, with masters where there are copies."""
    finite = torch.isfinite(grad_norm)
    lists = [list(ts) for ts in (grads, copies or params, exp_avgs, exp_avg_sqs, *([params] if copies else ()))]
    op = getattr(importlib.import_module("amp_C"), APEX_OPS[1] if copies else APEX_OPS[0])
    op(
        APEX_CHUNK, (~finite).int().reshape(1), lists, lr, beta1, beta2, eps, (step + 1).int(), ADAMW_MODE,
        BIAS_CORRECTION, weight_decay, clip_factor(grad_norm, max_norm).reshape(1),
    )  # fmt: skip
    step.add_(finite)
    update_emas(params, emas, step, grad_norm, ema_decay, ema_warmup)


def clip_factor(grad_norm: Tensor, max_norm: float) -> Tensor:
    """The factor of the gradients: min(1, max_norm / (norm + 1e-6)), or 1 if clipping is off."""
    return (max_norm / (grad_norm + 1e-6)).clamp_max(1.0) if max_norm > 0 else torch.ones_like(grad_norm)


def ema_weight(step: Tensor, grad_norm: Tensor, decay: float, warmup: bool) -> Tensor:
    """What an average moves by towards the weights after their update `step`: 0 if it was skipped, else 1 − decay.

    warmup: the decay after n updates is at most (1 + n)/(10 + n). 0-dim float32, on the device.
    """
    taken = torch.isfinite(grad_norm).float()
    return taken * ((9 / (9 + step)).clamp_min(1 - decay) if warmup else 1 - decay)


def update_emas(
    params: Sequence[Tensor], emas: Sequence[Tensor], step: Tensor, grad_norm: Tensor, decay: float, warmup: bool
) -> None:
    """ema += (1 − decay)·(p − ema) after update `step`, unless that was skipped; `emas` one a parameter, or empty."""
    if emas:
        weight = ema_weight(step, grad_norm, decay, warmup)
        torch._foreach_lerp_(list(emas), list(params), [weight] * len(emas))


def apex_refusal(device: torch.device) -> str | None:
    """Why apex's step can't run on the device; None if it can."""
    if device.type != "cuda":
        return "runs on cuda only"
    try:
        library: Any = importlib.import_module("amp_C")
    except Exception as error:  # built for another torch it fails in many ways
        problem = f"amp_C can't be imported ({type(error).__name__})"
    else:
        lacking = [op for op in APEX_OPS if not hasattr(library, op)]
        if not lacking:
            return None
        problem = f"amp_C has no {' and no '.join(lacking)}"
    return f"{problem}: NVIDIA's apex with its CUDA extensions is built from source; apex on PyPI is another project"


IMPLEMENTATIONS = {
    "st_fast": Implementation(kernels.adamw_ema_, kernels.grad_norm),
    "torch": Implementation(torch_update, torch_norm),
    "apex": Implementation(apex_update, torch_norm, apex_refusal),
}
