"""`torch.ops.st_fast.*`: schemas, dispatch, fakes and autocast. Gradients are in `gradients.py`.

One op name for every device: CPU → csrc if it is built (`linear`: oneDNN), CUDA → Triton (csrc for the optimiser if it
is built), anything else → `composite.py`.

Autocast: the ops are precise as they are, because they compute in float32 whatever comes in. So under autocast the
inputs keep their dtypes, the outputs have the dtypes the schema promises, and nothing inside is cast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import composite, native, onednn, reference

LIBRARY = torch.library.Library("st_fast", "DEF")
IN_PLAIN_PYTORCH = torch.library.Library("st_fast_reference", "DEF")  # where float64 goes

SCHEMAS = {
    "norm_modulate": "(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    "norm_modulate_backward": "(Tensor dy, Tensor x, Tensor scale, Tensor mean, Tensor rstd)"
    " -> (Tensor dx, Tensor dmod)",
    "gate_residual_norm_modulate": "(Tensor x, Tensor a, Tensor gate, Tensor shift, Tensor scale, float eps)"
    " -> (Tensor x_out, Tensor y, Tensor mean, Tensor rstd)",
    "gate_residual_norm_modulate_backward": "(Tensor dx_out, Tensor dy, Tensor x_out, Tensor a, Tensor gate,"
    " Tensor scale, Tensor mean, Tensor rstd) -> (Tensor dx, Tensor da, Tensor dmod)",
    "gate_residual": "(Tensor x, Tensor a, Tensor gate) -> Tensor",
    "gate_residual_backward": "(Tensor dx_out, Tensor a, Tensor gate) -> (Tensor da, Tensor dgate)",
    "align": "(Tensor q, Tensor f, Tensor weight) -> (Tensor loss, Tensor dq)",
    "guided_feature_loss": "(Tensor q, Tensor f_cond, Tensor f_null, Tensor weight, float cfg_scale, str loss,"
    " Tensor? index) -> (Tensor loss, Tensor dq)",
    "cfg_extrapolate": "(Tensor f_cond, Tensor f_null, float cfg_scale) -> Tensor",
    "qk_norm": "(Tensor qkv, Tensor q_weight, Tensor q_bias, Tensor k_weight, Tensor k_bias, float eps)"
    " -> (Tensor q, Tensor k, Tensor v, Tensor stats)",
    "qk_norm_backward": "(Tensor dq, Tensor dk, Tensor dv, Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor stats)"
    " -> (Tensor dqkv, Tensor dq_weight, Tensor dq_bias, Tensor dk_weight, Tensor dk_bias)",
    "attention": "(Tensor qkv) -> (Tensor out, Tensor lse)",
    "attention_backward": "(Tensor dout, Tensor qkv, Tensor out, Tensor lse) -> Tensor",
    "linear": "(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    "linear_backward": "(Tensor dy, Tensor x, Tensor weight) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    "gelu_tanh": "(Tensor x) -> Tensor",
    "gelu_tanh_backward": "(Tensor dy, Tensor x) -> Tensor",
    "grad_norm": "(Tensor[] grads) -> Tensor",
    "adamw_ema_": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] emas, Tensor(e!)[] copies, Tensor(f!) step, Tensor grad_norm, Tensor lr, float beta1, float beta2,"
    " float eps, float weight_decay, float ema_decay, float max_norm) -> ()",
}

TRITON_FILES = {
    "adaln": (
        "norm_modulate", "norm_modulate_backward", "gate_residual_norm_modulate",
        "gate_residual_norm_modulate_backward", "gate_residual", "gate_residual_backward",
    ),
    "guidance": ("align", "guided_feature_loss", "cfg_extrapolate"),
    "qknorm": ("qk_norm", "qk_norm_backward"),
    "adamw": ("grad_norm", "adamw_ema_"),
}  # fmt: skip
"""Which file launches which op on CUDA; imported at the first call, so that a CPU run never imports Triton."""


def _statistic(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A fake of statistics or losses: in the computing dtype."""
    return like.new_empty(shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def _new(like: Tensor) -> Tensor:
    """A fake of an output: contiguous, whatever the strides of what it is like."""
    return like.new_empty(like.shape)


def _fake_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, ...]:
    return _new(x), _statistic(x, x.shape[:2]), _statistic(x, x.shape[:2])


def _fake_norm_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, ...]:
    return _new(x), scale.new_empty((x.shape[0], 2 * x.shape[2]))


def _fake_gate_residual_norm_modulate(
    x: Tensor, a: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, ...]:
    return _new(x), _new(x), _statistic(x, x.shape[:2]), _statistic(x, x.shape[:2])


def _fake_gate_residual_norm_modulate_backward(
    dx_out: Tensor, dy: Tensor, x_out: Tensor, a: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, ...]:
    return _new(x_out), _new(a), scale.new_empty((x_out.shape[0], 3 * x_out.shape[2]))


def _fake_gate_residual(x: Tensor, a: Tensor, gate: Tensor) -> Tensor:
    return _new(x)


def _fake_gate_residual_backward(dx_out: Tensor, a: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    return _new(a), _new(gate)


def _fake_align(q: Tensor, f: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return _statistic(q, ()), _new(q)


def _fake_guided_feature_loss(
    q: Tensor, f_cond: Tensor, f_null: Tensor, weight: Tensor, cfg_scale: float, loss: str, index: Tensor | None
) -> tuple[Tensor, ...]:
    return _statistic(q, ()), _new(q)


def _fake_cfg_extrapolate(f_cond: Tensor, f_null: Tensor, cfg_scale: float) -> Tensor:
    return _new(f_cond)


def _fake_qk_norm(
    qkv: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, eps: float
) -> tuple[Tensor, ...]:
    b, n, _, h, d = qkv.shape
    q, k, v = (qkv.new_empty((b, h, n, d)) for _ in range(3))
    return q, k, v, _statistic(qkv, (4, b, h, n))


def _fake_qk_norm_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, stats: Tensor
) -> tuple[Tensor, ...]:
    return _new(qkv), _new(q_weight), _new(q_weight), _new(k_weight), _new(k_weight)


def _fake_attention(qkv: Tensor) -> tuple[Tensor, ...]:
    b, n, _, h, d = qkv.shape
    return qkv.new_empty((b, n, h, d)), _statistic(qkv, (b, h, n))


def _fake_attention_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    return _new(qkv)


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_linear_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return _new(x), _new(weight), weight.new_empty(weight.shape[:1])


def _fake_gelu_tanh(x: Tensor) -> Tensor:
    return _new(x)


def _fake_gelu_tanh_backward(dy: Tensor, x: Tensor) -> Tensor:
    return _new(x)


def _fake_grad_norm(grads: Sequence[Tensor]) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float32)


def _fake_adamw_ema_(*args: Any) -> None:
    return None


def _on_cuda(file: str, name: str) -> Callable[..., Any]:
    """The Triton launcher of an op, run on the device of its first tensor; float64 stays with plain PyTorch."""

    def launch(*args: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        if first.dtype == torch.float64:
            return getattr(torch.ops.st_fast_reference, name)(*args)
        with torch.cuda.device(first.device):
            return getattr(import_module(f".{file}", __package__), name)(*args)

    return launch


def _without_autocast(op: torch._ops.OpOverload, device_type: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with torch.autocast(device_type, enabled=False):
            return op(*args)

    return call


def _define() -> None:
    """Schemas first, then csrc, which brings kernels but no schemas, then whatever it left open."""
    for name, schema in SCHEMAS.items():
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
        plain = getattr(composite, name, None) or getattr(reference, name)
        LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
        IN_PLAIN_PYTORCH.define(name + schema)
        IN_PLAIN_PYTORCH.impl(name, plain, "CompositeExplicitAutograd")
    native.load()
    if onednn.available():
        LIBRARY.impl("linear", onednn.linear, "CPU")
        LIBRARY.impl("linear_backward", onednn.linear_backward, "CPU")
    for file, names in TRITON_FILES.items():
        for name in names:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"st_fast::{name}", "CUDA"):
                LIBRARY.impl(name, _on_cuda(file, name), "CUDA")
    for name in SCHEMAS:
        op = getattr(torch.ops.st_fast, name).default
        LIBRARY.impl(name, _without_autocast(op, "cpu"), "AutocastCPU")
        LIBRARY.impl(name, _without_autocast(op, "cuda"), "AutocastCUDA")
        torch.library.register_fake(f"st_fast::{name}", globals()[f"_fake_{name}"], lib=LIBRARY)


_define()
