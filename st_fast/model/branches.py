"""A guided teacher's two branches, with the labels and with the null label: three ways to run them on one device.

All share the patch embedding and compute the same streams: a product's rows do not depend on how many there are,
but for the rounding of a library that sums in another order for another size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from st_fast.model.side_stream import SideStream

Features = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Tokens (B, N, D), t (B,) and labels (B,) → the stream after the teacher's block (B, N, D)."""
Branches = Callable[[Features, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Runs both: features, tokens, t, labels, null labels → the streams with the labels and with the null label."""


def batched(
    features: Features, tokens: Tensor, t: Tensor, labels: Tensor, null_labels: Tensor
) -> tuple[Tensor, Tensor]:
    """As one batch of 2B: the largest products."""
    both = features(tokens.repeat(2, 1, 1), t.repeat(2), torch.cat((labels, null_labels)))
    conditional, null = both.chunk(2)
    return conditional, null


class Apart:
    """As two batches of B: one after the other, or with a side stream at the same time. Half the activations."""

    def __init__(self, side: SideStream) -> None:
        self._side = side

    def __call__(
        self, features: Features, tokens: Tensor, t: Tensor, labels: Tensor, null_labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        self._side.follow()
        null = self._side.start(lambda: features(tokens, t, null_labels), (tokens, t, null_labels))
        conditional = features(tokens, t, labels)
        return conditional, null()
