"""Attention behind one function: softmax(q·kᵀ/√d)·v over all tokens, by the backend that the device does best.

Every backend takes q, k, v (B, H, N, d) of one dtype and returns (B, H, N, d). A backend is chosen once, before
training, and only after its output and gradients were compared with float32 on the device: a fast wrong one has been
shipped before (flash-attention#2896).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from st_fast.errors import UserError

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Backend:
    """One way to compute attention: where it runs, which head sizes it takes, and what is missing here, if anything."""

    name: str
    attend: Attend
    devices: tuple[str, ...]
    most_head_dim: int
    multiple: int
    missing: Callable[[], str | None]

    def refusal(self, device: torch.device, head_dim: int) -> str | None:
        """Why it can't serve, in a few words; None if it can."""
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if head_dim > self.most_head_dim or head_dim % self.multiple:
            return f"takes head sizes up to {self.most_head_dim} in multiples of {self.multiple}, not {head_dim}"
        return self.missing()


def _sdpa(kind: SDPBackend | None) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if kind is None:
            return F.scaled_dot_product_attention(q, k, v)
        with sdpa_kernel([kind]):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def _tokens_first(module: str, function: str) -> Attend:
    """A library function that takes (B, N, H, d)."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call = getattr(importlib.import_module(module), function)
        out = call(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


def _imports(module: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        try:
            importlib.import_module(module)
        except Exception as error:  # a library built for another torch fails in many ways
            return f"{module} can't be imported ({type(error).__name__})"
        return None

    return missing


def _nothing() -> str | None:
    return None


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("sdpa", _sdpa(None), ("cpu", "cuda"), 2**16, 1, _nothing),
        Backend("cudnn", _sdpa(SDPBackend.CUDNN_ATTENTION), ("cuda",), 128, 8, _nothing),
        Backend("flash", _sdpa(SDPBackend.FLASH_ATTENTION), ("cpu", "cuda"), 256, 8, _nothing),
        Backend("efficient", _sdpa(SDPBackend.EFFICIENT_ATTENTION), ("cuda",), 2**16, 8, _nothing),
        Backend("math", _sdpa(SDPBackend.MATH), ("cpu", "cuda"), 2**16, 1, _nothing),
        Backend(
            "flash_attn", _tokens_first("flash_attn", "flash_attn_func"), ("cuda",), 256, 8, _imports("flash_attn"),
        ),
        Backend(
            "flash_attn_4", _tokens_first("flash_attn.cute", "flash_attn_func"), ("cuda",), 128, 8,
            _imports("flash_attn.cute"),
        ),
        Backend(
            "xformers", _tokens_first("xformers.ops", "memory_efficient_attention"), ("cuda",), 128, 8,
            _imports("xformers.ops"),
        ),
    )
}  # fmt: skip

AUTO_ORDER = {"cuda": ("cudnn", "flash", "efficient", "math"), "cpu": ("sdpa",)}
"""What "auto" tries. cuDNN takes head_dim 72 as it is, where FlashAttention 2 and 3 pad it to 96; so far unmeasured."""

TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest error, relative to the largest entry, that output and gradients may show against float32."""


def choose(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, say: Say) -> Attend:
    """The attention function for a model. `name` is a backend or "auto": the first of the pinned order that is right.

    UserError if the named backend is unknown, can't serve here, or computes wrongly here; says which ones can.
    """
    if name != "auto" and name not in BACKENDS:
        raise UserError(f"model.attention = {name!r}: one of auto, {', '.join(BACKENDS)}")
    for candidate in AUTO_ORDER[device.type] if name == "auto" else (name,):
        backend = BACKENDS[candidate]
        problem = backend.refusal(device, head_dim) or verify(backend.attend, device, dtype, head_dim)
        if problem is None:
            return backend.attend
        if name != "auto":
            able = [b.name for b in BACKENDS.values() if b.refusal(device, head_dim) is None]
            raise UserError(f"model.attention = {name!r}: {problem}; available here: {', '.join(able)}")
        say(f"attention: {candidate} left out: {problem}")
    raise UserError(f"model.attention: no backend computes attention right on {device} in {dtype}")


def verify(attend: Attend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Compares output and gradients with float64-on-the-CPU truth on random data; None if all are within TOLERANCE."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 2, 256, head_dim, generator=generator).to(dtype) for _ in range(4)]
    try:
        ours = _with_gradients(attend, [x.to(device) for x in inputs])
    except Exception as error:  # whatever a backend throws here it would throw in training
        return f"fails with {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    truth = _with_gradients(F.scaled_dot_product_attention, [x.double() for x in inputs])
    for what, got, expected in zip(("output", "dq", "dk", "dv"), ours, truth, strict=True):
        off = ((got.cpu().double() - expected).abs().max() / expected.abs().max()).item()
        if not off <= TOLERANCE[dtype]:
            return f"{what} is off by {off:.1e} of its largest entry (allowed: {TOLERANCE[dtype]:.0e})"
    return None


def _with_gradients(attend: Attend, inputs: list[Tensor]) -> list[Tensor]:
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    out = attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])]
