"""nn.Linear through the kernel table."""

from __future__ import annotations

from torch import Tensor, nn

from st_fast.kernels import KernelTable


class Linear(nn.Linear):
    """y = x·Wᵀ + b by the table's `linear`: (…, in) → (…, out). Initialised and saved like nn.Linear."""

    def __init__(self, in_features: int, out_features: int, kernels: KernelTable) -> None:
        super().__init__(in_features, out_features)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.kernels.linear(x, self.weight, self.bias)
        return y
