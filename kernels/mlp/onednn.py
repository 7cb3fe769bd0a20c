"""Linear layers on the CPU through oneDNN, which PyTorch carries but uses for 16-bit types only.

At the shapes of a SiT-S its float32 products run 10 to 15 % faster than those of the BLAS on AVX-512 (bench/results,
`linear`). It adds up a sum in one chain, though: beyond LONGEST terms its error exceeds twice the BLAS's, which then
serves. So it does for the weight's gradient, for which oneDNN would have both factors transposed first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import definition

OP = "mkldnn::_linear_pointwise"
"""What Inductor calls for linear layers: x·Wᵀ + bias with an epilogue; takes W of any strides, but where rows are apart
in memory (a cut of a wider weight) by plain loops, a thousand times as slow."""

LONGEST = 512
LEAST_ROWS, LEAST_WEIGHT = 256, 2**17
"""From how many rows of x and entries of the weight on it is faster: each call lays the weight out anew."""


def available() -> bool:
    """Whether this PyTorch has oneDNN and the op."""
    return torch.backends.mkldnn.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(OP, "CPU")


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether a layer is of the kind and size that oneDNN does faster than what PyTorch calls by itself."""
    large = weight.numel() >= LEAST_WEIGHT and x.numel() >= LEAST_ROWS * weight.shape[1]
    return large and min(weight.shape) <= LONGEST and x.device.type == "cpu" and x.dtype == torch.float32


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not weight.t().is_contiguous():
        weight = weight.contiguous()
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """→ x·Wᵀ + bias (…, M)."""
    if not pays(x, weight) or weight.shape[1] > LONGEST:
        return definition.linear_forward(x, weight, bias)
    return _product(x, weight, bias)


def linear_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """→ dx, dweight, dbias."""
    if not pays(x, weight) or weight.shape[0] > LONGEST:
        return definition.linear_backward(dy, x, weight)
    return _product(dy, weight.t(), None), *definition.weight_gradients(dy, x, weight)
