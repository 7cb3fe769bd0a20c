"""Stage 1 of Self-Transcendence (arXiv 2601.07773): a head on a shallow block predicts velocity or latents.

The released code predicts the velocity (`target = "velocity"`); the paper's text says the clean latent ("latent").
"""

import torch.nn.functional as F
from torch import Tensor, nn

from st_fast.kernels import KernelTable
from st_fast.model.layers import unpatchify
from st_fast.recipe import methods
from st_fast.recipe.schema import Model
from st_fast.train.supervision import NoisyBatch, Parts, Supervision, projector


class Head(nn.Module):
    """Tokens (M, N, D) → latents (M, C, H, W): MLP, LayerNorm without affine, linear, unpatchify.

    Keys `projectors.{0,2,4}.*` and `projectors_final.linear.*`, as the released checkpoints have them.
    """

    def __init__(self, config: Model, hidden: int, kernels: KernelTable) -> None:
        super().__init__()
        self.patch, self.channels = config.patch, config.channels
        self.projectors = projector(config.width, hidden, config.width, kernels)
        linear = nn.Linear(config.width, config.patch**2 * config.channels)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.projectors_final = nn.ModuleDict({"linear": linear})

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        z = self.projectors(tokens)
        z = F.layer_norm(z, z.shape[-1:], eps=1e-6)
        return unpatchify(self.projectors_final["linear"](z), self.patch, self.channels, grid)


class VelocityHead(Supervision):
    """Σ over supervised rows of weight · mean_CHW (head(h_d) − target)²."""

    settings: methods.VelocityHead

    def __init__(self, settings: methods.VelocityHead, parts: Parts) -> None:
        super().__init__(settings, parts)
        self.heads = Head(parts.config, settings.hidden, parts.kernels)

    def target(self, batch: NoisyBatch) -> tuple[Tensor, ...]:
        return (batch.rows.take(batch.velocity if self.settings.target == "velocity" else batch.x),)

    def loss(self, hidden: Tensor, target: tuple[Tensor, ...], batch: NoisyBatch) -> Tensor:
        height, width = target[0].shape[2:]
        patch = self.parts.config.patch
        prediction = self.heads(batch.rows.take(hidden), (height // patch, width // patch))
        losses = (prediction.float() - target[0]).square().mean((1, 2, 3))  # (M,)
        return (batch.rows.weight * losses).sum()
