"""REPA (arXiv 2410.06940): patch features of frozen image encoders supervise a shallow block of the student.

iREPA (arXiv 2512.10794) projects the student's tokens with a convolution, and takes most of the mean over the image out
of the features, so that what is learnt is their spatial structure.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_fast.core.errors import UserError
from st_fast.model.velocity_head import projector
from st_fast.recipe import methods
from st_fast.recipe.methods.repa import KERNEL
from st_fast.train.supervision import NoisyBatch, Parts, Supervision

EPS_DEVIATION = 1e-6
"""What is added to the features' deviation, as published."""


class Convolution(nn.Module):
    """A convolution on the tokens' grid: (B, N, D) → (B, N, D_j). It begins as PyTorch draws it, as published."""

    def __init__(self, width: int, out: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.projection_layer = nn.Conv2d(width, out, KERNEL, padding=KERNEL // 2)

    def forward(self, tokens: Tensor) -> Tensor:
        image = tokens.transpose(1, 2).unflatten(2, self.grid)  # (B, D, h, w), in memory still channels last
        return self.projection_layer(image).flatten(2).transpose(1, 2).contiguous()


class Heads(nn.Module):
    """A projector for each encoder, D → D_j: three linear layers, or a convolution on the grid.

    Keys as published: `projectors.{j}.{0,2,4}.*`, or iREPA's `projectors.{j}.projection_layer.*`.
    """

    def __init__(self, settings: methods.Repa, parts: Parts) -> None:
        super().__init__()
        width, grid = parts.config.width, parts.config.grid
        self.projectors = nn.ModuleList(
            Convolution(width, out, grid)
            if settings.projector == "conv"
            else projector(width, settings.hidden, out, parts.kernels)
            for out in parts.feature_widths
        )


class Repa(Supervision):
    """mean_j Σ_b weight_b · mean_n −cos(p_j(h), g_j), g_j (B, N, D_j) the features of encoder j, p_j its projector.

    The mean over encoders is the released code's.
    """

    settings: methods.Repa
    heads: Heads

    def __init__(self, settings: methods.Repa, parts: Parts) -> None:
        super().__init__(settings, parts)
        if len(parts.feature_widths) != len(settings.encoders):
            raise ValueError(f"repa needs features of {len(settings.encoders)} encoders")
        if settings.target_norm and parts.config.tokens < 2:
            told = f"target_norm = {settings.target_norm:g}"
            raise UserError(f"{told}: 0 is needed where images are one token, as features then have no deviation")
        self.heads = Heads(settings, parts)

    def target(self, batch: NoisyBatch) -> tuple[Tensor, ...]:
        features = batch.features
        if batch.images is not None:
            features = tuple(encoder(batch.images) for encoder in self.parts.encoders)
        found = (on_grid(one, self.parts.config.grid) for one in features)
        share = self.settings.target_norm
        return tuple(spatially_normalised(one, share) if share else one for one in found)

    def loss(self, hidden: Tensor, target: tuple[Tensor, ...], batch: NoisyBatch) -> Tensor:
        loss = batch.rows.weight.new_zeros(())
        for head, features in zip(self.heads.projectors, target, strict=True):
            q = head(hidden)
            loss = loss + self.kernels.align(q, features.to(q.dtype), batch.rows.weight).float()
        return loss / len(target)


def on_grid(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h, w, D) → (B, N, D) on the grid of the model's tokens, resized (bilinear) where the two differ."""
    if features.shape[1:3] != grid:
        channels_first = features.permute(0, 3, 1, 2).float()
        resized = F.interpolate(channels_first, grid, mode="bilinear", align_corners=False)
        features = resized.permute(0, 2, 3, 1).contiguous()
    return features.flatten(1, 2)


def spatially_normalised(features: Tensor, share: float) -> Tensor:
    """(B, N, D) less `share` times the mean over tokens, over the (unbiased) deviation, both of each channel of each
    image; in float32 or float64."""
    features = features if features.dtype == torch.float64 else features.float()
    deviation, mean = torch.std_mean(features, dim=1, keepdim=True)
    return (features - share * mean) / (deviation + EPS_DEVIATION)
