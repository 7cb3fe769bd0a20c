"""The MLP on CUDA with GELU inside its products: cuBLASLt's epilogues, called by csrc, in bfloat16 and float16.

fc1 writes gelu(h) and h in one product, and the backward pass makes dh and the gradient of fc1's bias in one. Without
csrc, without cuBLASLt in the process, in another dtype, and where csrc answers that it can't, plain PyTorch serves.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from .. import _ops
from .._ops import ops
from . import definition

log = logging.getLogger("st_fast")

DTYPES = (torch.bfloat16, torch.float16)
DEVICES = ("cuda", "meta")
"""Where a layer without gradients is one product: "meta" stands for CUDA, as its operations are counted there."""
ANSWERS = {  # of csrc/cuda/gelu_gemm.cu; 0: done
    1: "sizes must be multiples of 8 and addresses of 16 bytes",
    2: "cuBLASLt has no algorithm for it here",
    3: "this shape is new while a CUDA graph is being captured",
}


@cache
def lacking() -> str | None:
    """Why csrc's products can't be had in this process; None: they can."""
    native = getattr(_ops, "native", None)  # a copy in another project has none
    if native is None or not hasattr(ops, "lt_linear_gelu"):
        return "csrc's part for CUDA is not loaded"
    name = native.cublaslt_lacks()
    return None if name is None else f"{name} of cuBLASLt is not in this process"


@cache
def _say_once(why: str, shape: str) -> None:
    log.warning("st_fast: gelu_mlp in plain PyTorch for %s: %s.", shape, why)


def _done(answer: int, rows: Tensor, weight: Tensor) -> bool:
    """Whether csrc has computed a product; if not, one line says why, once."""
    if answer:
        sizes = "×".join(map(str, weight.shape))
        _say_once(ANSWERS[answer], f"{len(rows)} rows with a weight {sizes} in {str(rows.dtype).split('.')[1]}")
    return not answer


def _rows(x: Tensor) -> Tensor:
    """(…, K) → (R, K), contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """→ y (…, D'), g (…, M), h (…, M) on CUDA: `definition.gelu_mlp_forward`."""
    if x.dtype not in DTYPES or not x.numel():
        return definition.gelu_mlp_forward(x, w1, b1, w2, b2)
    rows, shape = _rows(x), x.shape[:-1]
    g, h = (x.new_empty((*shape, w1.shape[0])) for _ in range(2))
    flat = (g.view(-1, w1.shape[0]), h.view(-1, w1.shape[0]))
    if not _done(ops.lt_linear_gelu(rows, w1.contiguous(), b1.contiguous(), *flat), rows, w1):
        return definition.gelu_mlp_forward(x, w1, b1, w2, b2)
    return torch.nn.functional.linear(g, w2, b2), g, h


def backward(dy: Tensor, w2: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """→ dh (…, M), db1 (M,) on CUDA: `definition.gelu_mlp_backward`."""
    if dy.dtype not in DTYPES or not dy.numel():
        return definition.gelu_mlp_backward(dy, w2, h)
    rows, inner = _rows(dy), _rows(h)
    dh, db1 = torch.empty_like(inner), h.new_empty(h.shape[-1:])
    if not _done(ops.lt_gelu_backward(rows, w2.contiguous(), inner, dh, db1), rows, w2):
        return definition.gelu_mlp_backward(dy, w2, h)
    return dh.view(h.shape), db1


def frozen(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """→ y (…, D') on CUDA, nothing kept. PyTorch's op is the tanh form there, and the one with erf on the CPU."""
    g = torch._addmm_activation(b1, x.reshape(-1, x.shape[-1]), w1.t(), use_gelu=True)
    return torch.nn.functional.linear(g.view(*x.shape[:-1], w1.shape[0]), w2, b2)
