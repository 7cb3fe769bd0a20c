"""Heads that supervision reads from a shallow block's tokens, of which sampling may use one: stage 1's.

Shapes: B or M samples, N tokens, D width, C latent channels, H and W a latent's height and width.
"""

from itertools import chain, pairwise
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from st_fast.kernels import KernelTable
from st_fast.model.layers import Linear, unpatchify
from st_fast.recipe.schema import Model


def projector(width: int, hidden: int, out: int, kernels: KernelTable, layers: int = 3) -> nn.Sequential:
    """An MLP of linear layers, keys 0, 2, 4 …, with SiLU between; with three of them it is REPA's projector."""
    sizes = pairwise((width, *[hidden] * (layers - 1), out))
    linear = [Linear(inputs, outputs, kernels) for inputs, outputs in sizes]
    for layer in linear:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    between = ((layer, nn.SiLU()) for layer in linear[:-1])
    return nn.Sequential(*chain.from_iterable(between), linear[-1])


class Head(nn.Module):
    """Stage 1's head (arXiv 2601.07773): tokens (M, N, D) → their patches of a latent (M, N, p·p·C).

    MLP, LayerNorm without affine, linear. Keys `projectors.{0,2,4}.*` and `projectors_final.linear.*`, as
    the released checkpoints have them.
    """

    def __init__(self, config: Model, hidden: int, kernels: KernelTable) -> None:
        super().__init__()
        self.patch, self.channels = config.patch, config.channels
        self.projectors = projector(config.width, hidden, config.width, kernels)
        linear = nn.Linear(config.width, config.patch**2 * config.channels)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.projectors_final = nn.ModuleDict({"linear": linear})

    def forward(self, tokens: Tensor) -> Tensor:
        z = self.projectors(tokens)
        z = F.layer_norm(z, z.shape[-1:], eps=1e-6)
        return cast(Tensor, self.projectors_final["linear"](z))

    def latents(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The patches of all of a grid's tokens as latents (M, C, H, W)."""
        return unpatchify(self(tokens), self.patch, self.channels, grid)
