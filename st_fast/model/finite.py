"""Weights that are read must be finite: attention may hide a NaN of a frozen network, from which a student learns."""

from collections.abc import Mapping

import torch
from torch import Tensor

from st_fast.core.errors import UserError


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """UserError, naming the first tensor with a NaN or an infinity and how many there are."""
    for name, tensor in tensors.items():
        # A cheap first look: a sum is finite only if all are. It may overflow where they are.
        if not tensor.is_floating_point() or torch.isfinite(tensor.sum(dtype=torch.float64)):
            continue
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise UserError(f"{where}: {name} {tuple(tensor.shape)} has {bad} values that are NaN or infinite")
