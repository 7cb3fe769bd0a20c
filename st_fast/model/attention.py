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

from st_fast import kernels
from st_fast.errors import UserError

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Say = Callable[[str], None]


Missing = Callable[[torch.device, int], str | None]
"""(device, head size) → what a backend lacks there, in a few words; None if nothing."""


@dataclass(frozen=True)
class Backend:
    """One way to compute attention: where it runs, which head sizes it takes, and what is missing here, if anything."""

    name: str
    attend: Attend
    devices: tuple[str, ...]
    least_head_dim: int
    most_head_dim: int
    multiple: int
    missing: Missing

    def refusal(self, device: torch.device, head_dim: int) -> str | None:
        """Why it can't serve, in a few words; None if it can."""
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if not self.least_head_dim <= head_dim <= self.most_head_dim or head_dim % self.multiple:
            sizes = f"from {self.least_head_dim} to {self.most_head_dim}"
            return f"takes head sizes {sizes} in multiples of {self.multiple}, not {head_dim}"
        return self.missing(device, head_dim)


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


def _exports(module: str, function: str) -> Missing:
    def missing(device: torch.device, head_dim: int) -> str | None:
        try:
            getattr(importlib.import_module(module), function)
        except Exception as error:  # a library built for another torch fails in many ways
            return f"{module} can't be imported ({type(error).__name__})"
        return None

    return missing


def _nothing(device: torch.device, head_dim: int) -> str | None:
    return None


def _torch_can(name: str) -> Missing:
    """On CUDA torch knows, by its version, cuDNN's and the GPU's, whether the kernel takes such a head."""

    def missing(device: torch.device, head_dim: int) -> str | None:
        if device.type != "cuda":
            return None
        q = torch.empty(1, 1, 64, head_dim, device=device, dtype=torch.bfloat16, requires_grad=True)
        # is_causal and enable_gqa stay off, as in every call of ours.
        asked = torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, False, False)
        able = getattr(torch.backends.cuda, f"can_use_{name}_attention")(asked, False)
        return None if able else f"torch {torch.__version__} has no such kernel for head size {head_dim} on this GPU"

    return missing


def _xformers_dispatches(device: torch.device, head_dim: int) -> str | None:
    """Asks xformers which kernels it would take: built for another torch it imports all the same, with none."""
    try:
        fmha = importlib.import_module("xformers.ops.fmha")
        q = torch.empty(1, 64, 1, head_dim, device=device, dtype=torch.bfloat16, requires_grad=True)
        inputs = fmha.Inputs(query=q, key=q, value=q)
        fmha._dispatch_fw(inputs, True)
        fmha._dispatch_bw(inputs, None)
    except NotImplementedError:
        return f"xformers imports but has no kernel for head size {head_dim} here (python -m xformers.info says why)"
    except Exception as error:  # a library built for another torch fails in many ways
        return f"xformers.ops.fmha can't be used ({type(error).__name__})"
    return None


class Packed:
    """csrc's attention, which reads q, k and v where the projection wrote them and writes their gradients so."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As every backend; the three are packed first."""
        return self.packed(torch.stack([x.transpose(1, 2) for x in (q, k, v)], dim=2)).transpose(1, 2)

    def packed(self, qkv: Tensor) -> Tensor:
        """qkv (B, N, 3, H, d) → (B, N, H, d)."""
        return kernels.attention(qkv)


def attend_packed(attend: Attend, qkv: Tensor) -> Tensor:
    """Attention from the packed projection (B, N, 3, H, d) by any backend: (B, N, H, d)."""
    if isinstance(attend, Packed):
        return attend.packed(qkv)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, d) each
    return attend(q, k, v).transpose(1, 2)


def _csrc(device: torch.device, head_dim: int) -> str | None:
    return None if kernels.native.available() else "csrc is not built"


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("sdpa", _sdpa(None), ("cpu", "cuda"), 1, 2**16, 1, _nothing),
        Backend("csrc", Packed(), ("cpu",), 32, 256, 32, _csrc),
        Backend("cudnn", _sdpa(SDPBackend.CUDNN_ATTENTION), ("cuda",), 8, 256, 8, _torch_can("cudnn")),
        Backend("flash", _sdpa(SDPBackend.FLASH_ATTENTION), ("cpu", "cuda"), 8, 256, 8, _torch_can("flash")),
        Backend("efficient", _sdpa(SDPBackend.EFFICIENT_ATTENTION), ("cuda",), 8, 2**16, 8, _torch_can("efficient")),
        Backend("math", _sdpa(SDPBackend.MATH), ("cpu", "cuda"), 1, 2**16, 1, _nothing),
        Backend(
            "flash_attn", _tokens_first("flash_attn", "flash_attn_func"), ("cuda",), 8, 256, 8,
            _exports("flash_attn", "flash_attn_func"),
        ),
        Backend(
            "flash_attn_4", _tokens_first("flash_attn.cute", "flash_attn_func"), ("cuda",), 64, 128, 8,
            _exports("flash_attn.cute", "flash_attn_func"),
        ),
        Backend(
            "xformers", _tokens_first("xformers.ops", "memory_efficient_attention"), ("cuda",), 8, 2**16, 8,
            _xformers_dispatches,
        ),
    )
}  # fmt: skip
"""flash_attn takes heads up to 256 (its README); flash_attn_4 is held to 64 … 128, the sizes it began with, and above
that torch and xformers are asked for theirs."""

AUTO_ORDER = {"cuda": ("cudnn", "flash", "efficient", "math"), "cpu": ("csrc", "sdpa")}
"""What "auto" tries. cuDNN takes head_dim 72 as it is, where FlashAttention 2 and 3 pad it to 96; so far unmeasured."""

TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest error, relative to the largest entry, that output and gradients may show against float32."""


def choose(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, say: Say, tokens: int = 256) -> Attend:
    """The attention function for a model. `name` is a backend or "auto": the first of the pinned order that is right.

    UserError if the named backend is unknown, can't serve here, or computes wrongly here; says which ones can.
    """
    if name != "auto" and name not in BACKENDS:
        raise UserError(f"model.attention = {name!r}: one of auto, {', '.join(BACKENDS)}")
    for candidate in AUTO_ORDER[device.type] if name == "auto" else (name,):
        backend = BACKENDS[candidate]
        problem = backend.refusal(device, head_dim) or verify(backend.attend, device, dtype, head_dim, tokens)
        if problem is None:
            return backend.attend
        if name != "auto":
            able = [b.name for b in BACKENDS.values() if b.name != name and b.refusal(device, head_dim) is None]
            raise UserError(f"model.attention = {name!r}: {problem}; available here: {', '.join(able)}")
        say(f"attention: {candidate} left out: {problem}")
    raise UserError(f"model.attention: no backend computes attention right on {device} in {dtype}")


def verify(attend: Attend, device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int = 256) -> str | None:
    """Compares output and gradients with float64-on-the-CPU truth on random data; None if all are within TOLERANCE.

    Twice: with heads contiguous, as qk-norm leaves them, and as views of one packed projection, as without it.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, tokens, 2, head_dim, generator=generator).to(dtype).transpose(1, 2) for _ in range(4)]
    truth = _with_gradients(F.scaled_dot_product_attention, [x.double() for x in inputs])
    for layout in (torch.preserve_format, torch.contiguous_format):
        try:
            ours = _with_gradients(attend, [x.to(device).clone(memory_format=layout) for x in inputs])
        except Exception as error:  # whatever a backend throws here it would throw in training
            lines = str(error).splitlines() or [""]
            return f"fails with {type(error).__name__}: {lines[0][:120]}"
        for what, got, expected in zip(("output", "dq", "dk", "dv"), ours, truth, strict=True):
            off = ((got.cpu().double() - expected).abs().max() / expected.abs().max()).item()
            if not off <= TOLERANCE[dtype]:
                return f"{what} is off by {off:.1e} of its largest entry (allowed: {TOLERANCE[dtype]:.0e})"
    return None


def _with_gradients(attend: Attend, inputs: list[Tensor]) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out = attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])]
