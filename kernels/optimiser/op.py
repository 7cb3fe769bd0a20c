"""grad_norm and adamw_ema_: public functions with their checks, and registration. They work on lists, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._ops import ops
from ..common import checks
from ..common.registry import Op, define
from . import definition

TRITON = __package__ + ".triton"

ALLOWED: dict[str, tuple[torch.dtype, ...]] = {
    "params": (torch.float32,),
    "grads": (torch.float32, torch.bfloat16),
    "exp_avgs": (torch.float32,),
    "exp_avg_sqs": (torch.float32,),
    "emas": (torch.float32,),
    "copies": (torch.bfloat16, torch.float16),
    "step": (torch.float32, torch.int64),
    "grad_norm": (torch.float32,),
    "lr": (torch.float32,),
}
"""The dtypes adamw_ema_ takes, by argument."""


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """√ Σ g² over all tensors, a 0-dim float32 tensor on their device; independent of order, grouping and threads."""
    if not grads:
        return definition.grad_norm(grads)
    checks.floating("grad_norm", **{f"grads[{i}]": g for i, g in enumerate(grads)})
    norm: Tensor = ops.grad_norm(list(grads))
    return norm


@torch.no_grad()
def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    copies: Sequence[Tensor],
    step: Tensor,
    grad_norm: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decay: float,
    max_norm: float,
    ema_warmup: bool = False,
) -> None:
    """One AdamW step, clipped, with EMA and low-precision copies, in place; none at all if grad_norm is not finite."""
    _check(
        "adamw_ema_",
        params,
        {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs},
        {"emas": emas, "copies": copies},
        {"step": step, "grad_norm": grad_norm, "lr": lr},
    )
    lists = [list(tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs, emas, copies)]
    ops.adamw_ema_(*lists, step, grad_norm, lr, beta1, beta2, eps, weight_decay, ema_decay, max_norm, ema_warmup)


def _dtype(op: str, label: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        raise TypeError(f"{op}: {label} has dtype {tensor.dtype}; allowed: {', '.join(map(str, allowed))}")


def _check(
    op: str, params: Sequence[Tensor], lists: dict[str, Sequence[Tensor]], optional: dict[str, Sequence[Tensor]],
    scalars: dict[str, Tensor],
) -> None:  # fmt: skip
    """Lists of one length and shape for shape, optional ones maybe empty; scalars 0-dim on the same device."""
    if not params:
        raise ValueError(f"{op}: params is empty; at least one tensor is needed")
    device, shapes = params[0].device, [tensor.shape for tensor in params]
    for name, tensors in {"params": params, **lists, **optional}.items():
        if len(tensors) != len(params) and not (name in optional and len(tensors) == 0):
            raise ValueError(f"{op}: {name} has {len(tensors)} tensors; {len(params)}, one a parameter, are needed")
        allowed, written = ALLOWED[name], name != "grads"
        if (
            {tensor.dtype for tensor in tensors}.issubset(allowed)
            and [tensor.shape for tensor in tensors] == shapes[: len(tensors)]
            and {tensor.device for tensor in tensors} <= {device}
            and (not written or all(map(Tensor.is_contiguous, tensors)))
        ):
            continue
        for i, tensor in enumerate(tensors):
            label = f"{name}[{i}]"
            _dtype(op, label, tensor, allowed)
            if tensor.device != device:
                raise ValueError(f"{op}: {label} is on {tensor.device}; it must be on params[0]'s device, {device}")
            checks.shape(op, label, tensor, params[i].shape, f"the shape of params[{i}]")
            if written and not tensor.is_contiguous():
                raise ValueError(f"{op}: {label} has strides {tensor.stride()}; it is written, and must be contiguous")
    for name, scalar in scalars.items():
        checks.shape(op, name, scalar, (), "a 0-dim tensor, ()")
        _dtype(op, name, scalar, ALLOWED[name])
        if scalar.device != device:
            raise ValueError(f"{op}: {name} is on {scalar.device}; it must be on params[0]'s device, {device}")


define(
    "grad_norm",
    "(Tensor[] grads) -> Tensor",
    definition.grad_norm,
    lambda grads: grads[0].new_empty((), dtype=torch.float32),
    TRITON,
)
define(
    "adamw_ema_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] emas,"
    " Tensor(e!)[] copies, Tensor(f!) step, Tensor grad_norm, Tensor lr, float beta1, float beta2, float eps,"
    " float weight_decay, float ema_decay, float max_norm, bool ema_warmup=False) -> ()",
    definition.adamw_ema_,
    lambda *args: None,
    TRITON,
    unread=("copies", 1.0),
)

DECLARED = {
    "grad_norm": Op(grad_norm, definition.grad_norm),
    "adamw_ema_": Op(adamw_ema_, definition.adamw_ema_),
}
