"""REPA (arXiv 2410.06940): patch features of frozen image encoders supervise a shallow block of the student."""

import torch.nn.functional as F
from torch import Tensor, nn

from st_fast.kernels import KernelTable
from st_fast.recipe import methods
from st_fast.train.supervision import NoisyBatch, Parts, Supervision, projector


class Heads(nn.Module):
    """One MLP for each encoder, D → hidden → hidden → D_j. Keys `projectors.{j}.{0,2,4}.*`, as published."""

    def __init__(self, width: int, hidden: int, widths: tuple[int, ...], kernels: KernelTable) -> None:
        super().__init__()
        self.projectors = nn.ModuleList(projector(width, hidden, out, kernels) for out in widths)


class Repa(Supervision):
    """mean_j Σ_b weight_b · mean_n −cos(MLP_j(h), g_j), g_j (B, N, D_j) the features of encoder j.

    The mean over encoders is the released code's.
    """

    heads: Heads

    def __init__(self, settings: methods.Repa, parts: Parts) -> None:
        super().__init__(settings, parts)
        if len(parts.feature_widths) != len(settings.encoders):
            raise ValueError(f"repa needs features of {len(settings.encoders)} encoders")
        self.heads = Heads(parts.config.width, settings.hidden, parts.feature_widths, parts.kernels)

    def target(self, batch: NoisyBatch) -> tuple[Tensor, ...]:
        features = batch.features
        if batch.images is not None:
            features = tuple(encoder(batch.images) for encoder in self.parts.encoders)
        return tuple(on_grid(one, self.parts.config.grid) for one in features)

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
