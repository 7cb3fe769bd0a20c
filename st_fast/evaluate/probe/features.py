"""What every block of a model makes of a noisy latent, read without a change to the model's own forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from st_fast.model import SiT

T = TypeVar("T")


@torch.no_grad()
def read_blocks(
    model: SiT, x: Tensor, t: Tensor, labels: Tensor, look: Callable[[Tensor], T]
) -> tuple[Tensor, list[T]]:
    """x (B, C, S, S), t (B,), labels (B,) → velocity (B, C, S, S) and `look` of each stream (B, N, D).

    The first is the embedded input's, then one a block, in order: depth + 1 in all. A stream is looked at as soon as
    it is there, so that a deep model's streams need not be held together.
    """
    seen = [look(model.embed_tokens(x))]
    run = model.run_block

    def recording(block: nn.Module, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        stream, following = run(block, *arguments)
        seen.append(look(stream))
        return stream, following

    model.run_block = recording
    try:
        velocity, _ = model(x, t, labels)
    finally:
        model.run_block = run
    return velocity, seen
