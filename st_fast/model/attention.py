"""Attention behind one function: softmax(q·kᵀ/√d)·v over all tokens, by the backend that the device does best.

Every backend takes q, k, v (B, H, N, d) of one dtype and returns (B, H, N, d). A backend is chosen once, before
training, and only after its output and gradients were compared with float64 on the CPU: a fast wrong one has been
shipped before (flash-attention#2896).
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from st_fast import kernels
from st_fast.core.errors import Say, UserError
from st_fast.model.layout import Groups

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Missing = Callable[[torch.device, int], str | None]
"""(device, head size) → what a backend lacks there, in a few words; None if nothing."""


@dataclass(frozen=True)
class Backend:
    """One way to compute attention: where it runs, which head sizes it takes, and what is missing here, if anything."""

    name: str
    attend: Attend
    devices: tuple[str, ...]
    sizes: range = range(1, 2**16 + 1)
    missing: Missing = lambda device, head_dim: None

    def refusal(self, device: torch.device, head_dim: int) -> str | None:
        """Why it can't serve, in a few words; None if it can."""
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if head_dim not in self.sizes:
            sizes = f"from {self.sizes.start} to {self.sizes[-1]}"
            return f"takes head sizes {sizes} in multiples of {self.sizes.step}, not {head_dim}"
        return self.missing(device, head_dim)


def _needs_gradient(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


# The next three call the one op that scaled_dot_product_attention would, with the same arguments, for head sizes in
# multiples of 8: others it pads for flash. Chosen by sdpa_kernel instead, a compiled block changes global settings, and
# AOTAutograd caches no such graph: every start would trace it anew.


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if not (q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)):  # the op reads any as 16-bit
        raise TypeError(f"cudnn attention takes bfloat16 or float16, one for all, not {q.dtype}, {k.dtype}, {v.dtype}")
    attention = torch.ops.aten._scaled_dot_product_cudnn_attention
    out: Tensor = attention(q, k, v, None, _needs_gradient(q, k, v))[0]  # None: no mask
    return out


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    aten, on_cpu = torch.ops.aten, q.device.type == "cpu"
    attention = aten._scaled_dot_product_flash_attention_for_cpu if on_cpu else aten._scaled_dot_product_flash_attention
    out: Tensor = attention(q, k, v)[0]
    return out


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attention = torch.ops.aten._scaled_dot_product_efficient_attention
    out: Tensor = attention(q, k, v, None, _needs_gradient(q, k, v))[0]  # None: no mask
    return out


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By sdpa_kernel, since scaled_dot_product_attention computes 16-bit inputs in float32 here and its op does not."""
    with sdpa_kernel([SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v)


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
    """csrc's attention, which reads q, k and v where they lie and also writes their gradients as one packed tensor."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """As every backend. With `lengths` a token attends to its own group of consecutive tokens alone."""
        return kernels.attention_heads(q, k, v, lengths)

    def packed(self, qkv: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """qkv (B, N, 3, H, d) → (B, N, H, d)."""
        return kernels.attention(qkv, lengths)


def _unpacked(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k, v (B, H, N, d) of the packed projection (B, N, 3, H, d)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def attend_packed(attend: Attend, qkv: Tensor, groups: Groups | None = None) -> Tensor:
    """Attention from the packed projection (B, N, 3, H, d) by any backend: (B, N, H, d); see `within_groups`."""
    if not isinstance(attend, Packed):
        return within_groups(attend, *_unpacked(qkv), groups).transpose(1, 2)
    if groups is None or not groups.separated:
        return attend.packed(qkv)
    return _but_whole(groups, attend.packed(qkv, groups.lengths), attend.packed, qkv)


def within_groups(attend: Attend, q: Tensor, k: Tensor, v: Tensor, groups: Groups | None) -> Tensor:
    """q, k, v (B, H, N, d) → (B, H, N, d): over all tokens, or where groups are separated within each of them.

    Each group is an attention of its own, so its cost is Σ n_g² where a mask over all tokens costs N².
    """
    if groups is None or not groups.separated:
        return attend(q, k, v)
    if isinstance(attend, Packed):
        apart = attend(q, k, v, groups.lengths)
    else:
        pieces = zip(*(one.split(list(groups.lengths), 2) for one in (q, k, v)), strict=True)
        apart = torch.cat([attend(*piece) for piece in pieces], 2)
    return _but_whole(groups, apart, attend, q, k, v)


def _but_whole(groups: Groups, apart: Tensor, attend: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`apart`, but of the samples that are whole attend(*inputs): of all of them, since shapes must not change."""
    if groups.whole is None:
        return apart
    return torch.where(groups.whole.view(-1, 1, 1, 1), attend(*inputs), apart)


def _library(name: str, module: str, function: str, sizes: range, missing: Missing | None = None) -> Backend:
    attend = _tokens_first(module, function)
    return Backend(name, attend, ("cuda",), sizes, missing or _exports(module, function))


def _csrc(device: torch.device, head_dim: int) -> str | None:
    return None if kernels.native.available() else "csrc is not built"


UP_TO_256, ANY_8 = range(8, 257, 8), range(8, 2**16 + 1, 8)
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("sdpa", F.scaled_dot_product_attention, ("cpu", "cuda")),
        Backend("csrc", Packed(), ("cpu",), range(32, 257, 32), _csrc),
        Backend("cudnn", _cudnn, ("cuda",), UP_TO_256, _torch_can("cudnn")),
        Backend("flash", _flash, ("cpu", "cuda"), UP_TO_256, _torch_can("flash")),
        Backend("efficient", _efficient, ("cuda",), ANY_8, _torch_can("efficient")),
        Backend("math", _math, ("cpu", "cuda")),
        _library("flash_attn", "flash_attn", "flash_attn_func", UP_TO_256),
        _library("flash_attn_4", "flash_attn.cute", "flash_attn_func", range(64, 129, 8)),
        _library("xformers", "xformers.ops", "memory_efficient_attention", ANY_8, _xformers_dispatches),
    )
}
"""flash_attn takes heads up to 256 (its README); flash_attn_4 is held to 64 … 128, the sizes it began with, and above
that torch and xformers are asked for theirs."""

AUTO_ORDER = {"cuda": ("cudnn", "flash", "efficient", "math"), "cpu": ("csrc", "sdpa")}
"""What "auto" tries. cuDNN takes head_dim 72 as it is, where FlashAttention 2 and 3 pad it to 96; so far unmeasured."""

TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest error, relative to the largest entry, that output and gradients may show against float64."""


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


def _token_major(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _unpacked(qkv)
    return q.transpose(1, 2).contiguous().transpose(1, 2), k.transpose(1, 2).contiguous().transpose(1, 2), v


def _contiguous(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (part.contiguous() for part in _unpacked(qkv))
    return q, k, v


def _mixed_values(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _unpacked(qkv)
    return q, k, v.transpose(1, 2).contiguous().transpose(1, 2)


def _all_token_major(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, _ = _token_major(qkv)
    return q, k, _mixed_values(qkv)[2]


LAYOUTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None] = {
    "in the order (B, N, H, d), v a view of the packed projection": _token_major,
    "in the order (B, N, H, d)": _all_token_major,
    "contiguous": _contiguous,
    "views of the packed projection, v in the order (B, N, H, d)": _mixed_values,
    "views of the packed projection": None,
}
"""How q, k and v (B, H, N, d) lie in memory in training: after qk_norm, with values as they are or mixed;
after qk_norm with the layout "heads"; and without qk_norm, values mixed, or as they are, where
`attend_packed` takes the packed projection (B, N, 3, H, d)."""


def verify(attend: Attend, device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int = 256) -> str | None:
    """Compares output and gradients with float64-on-the-CPU truth on random data; None if all are within TOLERANCE.

    In each of LAYOUTS. The output's gradient comes as the layer after attention sends it: (B, N, H, d) in memory.
    """
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, tokens, 3, 3, head_dim, generator=generator).to(dtype)  # B = 2, H = 3
    dout = torch.randn(2, tokens, 3, head_dim, generator=generator).to(dtype)
    truth = _with_gradients(F.scaled_dot_product_attention, qkv.double(), dout.double())
    for layout, laid_out in LAYOUTS.items():
        try:
            ours = _with_gradients(attend, qkv.to(device), dout.to(device), laid_out)
        except Exception as error:  # whatever a backend throws here it would throw in training
            lines = str(error).splitlines() or [""]
            return f"fails with {type(error).__name__}: {lines[0][:120]}"
        for what, got, expected in zip(("output", "dq", "dk", "dv"), ours, truth, strict=True):
            off = ((got.cpu().double() - expected).abs().max() / expected.abs().max()).item()
            if not off <= TOLERANCE[dtype]:
                allowed = f"allowed: {TOLERANCE[dtype]:.0e}"
                return f"{what} is off by {off:.1e} of its largest entry ({allowed}) where q, k, v are {layout}"
    return None


def _with_gradients(
    attend: Attend, qkv: Tensor, dout: Tensor, laid_out: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None = None
) -> tuple[Tensor, ...]:
    """The output (B, N, H, d) and the gradients of q, k, v, in the same shape."""
    leaf = qkv.detach().requires_grad_()
    out = attend_packed(attend, leaf) if laid_out is None else attend(*laid_out(leaf)).transpose(1, 2)
    return out.detach(), *torch.autograd.grad(out, leaf, dout)[0].unbind(2)
